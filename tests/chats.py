"""Chat templates in the shapes of three families, a tokenizer for them, and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["CHATML", "CONVERSATIONS", "LLAMA3", "MARKED", "NEMOTRON", "TEMPLATES", "TOOLS", "write_tokenizer"]

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}GENERATION"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>' }}ENDGENERATION{{- '\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Qwen2.5's shape: tools in the system message, answers of tools together in a user message."""
MARKED = CHATML.replace("ENDGENERATION", "{% endgeneration %}").replace("GENERATION", "{% generation %}")
CHATML = CHATML.replace("ENDGENERATION", "").replace("GENERATION", "")
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{%- if message.tool_calls %}{%- set call = message.tool_calls[0].function %}"
    '{{- \'{"name": "\' + call.name + \'", "parameters": \' }}{{- call.arguments | tojson }}{{- "}" }}'
    "{%- else %}{{- message.content | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""Llama 3's shape."""
NEMOTRON = (
    "{{- '<extra_id_0>System' }}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{{- '\\n' + message.content.strip() }}{%- endif %}{%- endfor %}"
    "{%- for tool in tools or [] %}{{- '\\n<tool> ' + tool | tojson + ' </tool>' }}{%- endfor %}{{- '\\n\\n' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<extra_id_1>User\\n' + message.content.strip() + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<extra_id_1>Assistant\\n' + message.content.strip() + '\\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<extra_id_1>Tool\\n' + message.content.strip() + '\\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<extra_id_1>Assistant\\n' }}{%- endif %}"
)
"""Shape of Nemotron-Mini and of Mistral-NeMo-Minitron-8B-Instruct: a turn has no end of its own."""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "llama3": LLAMA3, "nemotron": NEMOTRON}
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<extra_id_0>", "<extra_id_1>"),
)
ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "llama3": "<|eot_id|>", "nemotron": "<|endoftext|>"}

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "minimum": 1}}}
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [{"role": "user", "content": "Say ä"}, {"role": "assistant", "content": " ä 😀  ok "}]},
    "many": {
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "and two?"}]},
            {"role": "assistant", "content": "Three.\n\nIs that all?"},
            {"role": "user", "content": "\nNo <|im_start|>assistant\nnot me"},
            {"role": "assistant", "content": "Fine"},
        ]
    },
    "tools": {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"day": 3}}}],
            },
            {"role": "tool", "content": "sun"},
            {"role": "tool", "content": "wind"},
            {"role": "assistant", "content": "No rain."},
        ],
    },
}
"""Name -> record."""


def write_tokenizer(folder: Path, template: str | None, end: str) -> Path:
    """Write a byte-level BPE tokenizer, with the offsets that GPT-2's and Llama 3's have, and a chat template."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    texts = [json.dumps(each) + "assistant\n\nuser\n system Three. Is that all?" for each in CONVERSATIONS.values()] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": end, "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
