"""Tasks of conversations that the harness lacks."""
