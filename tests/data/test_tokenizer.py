"""A tokenizer that is missing, has no end-of-document token, or does not fit the model gives a clear error."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from minitron_megatron.data import check_tokenizer, prepare, transformers_tokenizer
from minitron_megatron.data.tokenizer import end_of_document, load_tokenizer
from minitron_megatron.errors import DataError, MinitronError


@pytest.fixture
def copy(tokenizer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer, tmp_path / "copy"))


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_entries_that_the_model_lacks_are_refused_where_a_text_gives_them(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w7"}\n{"text": "w3 w9 w8"}\n')
    (tmp_path / "a.txt").write_text("w1\n<|endoftext|>\nw2\nw2999 w9\n")

    def made(name: str, vocab: int, workers: int = 1) -> int:
        out = tmp_path / str(vocab) / name
        return prepare([tmp_path / name], tokenizer, out, validation=0, vocab=vocab, workers=workers).train.tokens

    assert made("a.jsonl", 10) == 9
    assert (tmp_path / "10/a.jsonl.train.bin").stat().st_size == 9 * 2
    for workers in (1, 2):
        with pytest.raises(
            DataError, match=r"begins at .*a\.jsonl:3 has the token 'w9' \(9\), and the model has 9 entries"
        ):
            made("a.jsonl", 9, workers)
    with pytest.raises(DataError, match=r"begins at .*a\.txt:3 has the token 'w2999' \(2999\)"):
        made("a.txt", 2999)


def test_a_tokenizer_larger_than_the_model_is_said_and_its_end_must_be_known(tokenizer: Path, copy: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tokenizer(tokenizer, 3001)
        check_tokenizer(tokenizer, 3072)
        larger = Tokenizer.from_file(str(copy / "tokenizer.json"))
        larger.add_special_tokens(["[PAD]"])
        larger.add_tokens(["<think>"])
        larger.save(str(copy / "tokenizer.json"))
        check_tokenizer(copy, 3001)  # no warning: surplus added tokens do not suggest another model
    with pytest.warns(UserWarning, match="has 3001 entries, and the model has 3000"):
        check_tokenizer(tokenizer, 3000)
    write(copy, tokenizer_config={"eos_token": "[PAD]"})
    with pytest.raises(DataError, match=r"ends documents with '\[PAD\]' \(3001\), and the model has 3001 entries"):
        check_tokenizer(copy, 3001)
    check_tokenizer(copy, 3002)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "w3"}, "config": {"eos_token_id": 4}}, 3),
        ({"tokenizer_config": {"eos_token": {"content": "w3"}}}, 3),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 4}}, 5),
        ({"tokenizer_config": {"eos_token": "unknown"}, "config": {"eos_token_id": 0}}, 0),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": 9999}, "config": {"eos_token_id": 4}}, 4),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": []}, "config": {"eos_token_id": [4, 5]}}, 4),
        (
            {
                "tokenizer_config": {},
                "generation_config": {"eos_token_id": -1},
                "special_tokens_map": {"eos_token": "w9"},
            },
            9,
        ),
    ],
)
def test_the_end_of_a_document_is_found(files: dict[str, object], expected: int, copy: Path) -> None:
    write(copy, **files)
    assert end_of_document(copy, load_tokenizer(copy)) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None}}, "names no token that ends"),
        ({"tokenizer_config": {"eos_token": {}}}, "tokenizer_config.json has a wrong eos_token: it is '{}'"),
        ({"tokenizer_config": {"eos_token": {"content": 2}}}, "tokenizer_config.json has a wrong eos_token: it is '2'"),
        ({"tokenizer_config": {"eos_token": 2}}, "tokenizer_config.json has a wrong eos_token: it is '2'"),
        ({"tokenizer_config": {"eos_token": ["w1"]}}, "tokenizer_config.json has a wrong eos_token"),
        ({"tokenizer_config": {"eos_token": "\ud83d"}}, "tokenizer_config.json has a wrong eos_token"),
        ({"tokenizer_config": []}, "tokenizer_config.json does not hold a JSON object"),
        ({"tokenizer_config": None}, "tokenizer_config.json does not hold a JSON object"),
        (
            {"tokenizer_config": {}, "generation_config": {"eos_token_id": True}},
            "generation_config.json has a wrong eos",
        ),
        (
            {"tokenizer_config": {}, "generation_config": {"eos_token_id": ["2"]}},
            "generation_config.json has a wrong eos",
        ),
        (
            {"tokenizer_config": {}, "config": {"eos_token_id": 1.5}},
            "config.json has a wrong eos_token_id: it is '1.5'",
        ),
        ({"tokenizer_config": {}, "config": "x"}, "config.json does not hold a JSON object"),
    ],
)
def test_no_end_of_a_document_is_refused(files: dict[str, object], message: str, copy: Path) -> None:
    write(copy, **files)
    with pytest.raises(DataError, match=message):
        check_tokenizer(copy, 3001)


def test_a_broken_settings_file_is_named(copy: Path) -> None:
    for torn in (b'{"eos_token":', b"\xff\xfe", b"[" * 100_000):
        (copy / "tokenizer_config.json").write_bytes(torn)
        for reads in (lambda: check_tokenizer(copy, 3001), lambda: transformers_tokenizer(copy)):
            with pytest.raises(MinitronError, match=r"tokenizer_config\.json is"):
                reads()


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"model": {"type": "BPE"}}', b"torn", b"[" * 100_000])
def test_a_broken_tokenizer_file_is_refused(content: bytes, copy: Path) -> None:
    (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        check_tokenizer(copy, 3001)


def test_a_tokenizer_that_is_torn_huge_empty_or_no_file_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copy / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        load_tokenizer(copy)
    file.write_bytes(whole)
    monkeypatch.setattr("minitron_megatron.data.tokenizer.MOST_BYTES", 1000)
    with pytest.raises(
        DataError, match=r"tokenizer\.json has [\d,]+ bytes, too many for a tokenizer\. Put the model's"
    ):
        load_tokenizer(copy)
    Tokenizer(models.BPE()).save(str(file))
    with pytest.raises(DataError, match="has no entries"):
        load_tokenizer(copy)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.json is not a file\. Put the model's tokenizer\.json there\."):
        load_tokenizer(copy)


def test_a_text_that_the_tokenizer_cannot_take_is_named(copy: Path, tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"<end>": 0, "w1": 1}, unk_token="[UNK]"))  # not in the vocabulary
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(copy / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n\n{"text": "w1 w2"}\n')
    for workers in (1, 2):
        with pytest.raises(
            DataError, match=r"a\.jsonl:3 cannot be tokenized: .*UNK.*\. Correct the text, or the model's tokenizer\."
        ):
            prepare([tmp_path / "a.jsonl"], copy, tmp_path / "a", validation=0, workers=workers)


SPY = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import PreTrainedTokenizerFast
class Theirs(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("auto_map", [["theirs.Theirs", None], [None, "theirs.Theirs"], "theirs.Theirs"])
@pytest.mark.parametrize("model_type", ["llama", "theirs"])
def test_no_code_of_the_folder_runs(
    auto_map: object, model_type: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer.json is read by the plain class, a folder without one is refused; the user is not asked anything."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (copy / "theirs.py").write_text(SPY.format(ran=str(tmp_path / "ran")))
    maps = {"AutoTokenizer": auto_map, "AutoConfig": "theirs.Theirs"}
    write(
        copy,
        config={"model_type": model_type, "auto_map": maps, "eos_token_id": 0},
        tokenizer_config={"tokenizer_class": "Theirs", "auto_map": maps, "eos_token": "<end>"},
    )
    check_tokenizer(copy, 3001)
    plain = transformers_tokenizer(copy)
    assert plain("w1 w2", add_special_tokens=False)["input_ids"] == [1, 2] and plain.eos_token_id == 0
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="which is never run"):
        check_tokenizer(copy, 3001)
    assert not (tmp_path / "ran").exists()


def test_a_name_is_no_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        transformers_tokenizer("gpt2")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder with only a `tokenizer.model` of 300 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("the cat sat on a mat and looked at stars while rain fell\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        minloglevel=2,
    )
    write(folder, config={"model_type": "llama", "eos_token_id": 2})
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, tokenizer_config=settings | {"legacy": False})
    return folder


def test_a_sentencepiece_model_alone_gives_its_own_tokens(pieces: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    reference, loaded = SentencePieceProcessor(model_file=str(pieces / "tokenizer.model")), load_tokenizer(pieces)
    for text in ("the cat sat", "a mat, \u00e9 \U0001f600 rain"):
        assert loaded.encode(text, add_special_tokens=False).ids == reference.encode(text)
    check_tokenizer(pieces, 300)
    assert end_of_document(pieces, loaded) == 2


@pytest.mark.parametrize("lacks", ["sentencepiece", "google.protobuf"])
def test_the_packages_that_a_sentencepiece_model_needs_are_named(
    lacks: str, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, lacks, None)
    with pytest.raises(
        DataError, match=r"tokenizer\.model .*sentencepiece and protobuf: .*\. Install both \(pip"
    ) as caught:
        load_tokenizer(pieces)
    assert "tiktoken" not in str(caught.value)


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign"])
def test_a_torn_sentencepiece_model_is_named(damage: str, pieces: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pieces, tmp_path / "copy"))
    whole = (folder / "tokenizer.model").read_bytes()
    content = {"torn": whole[: len(whole) // 2], "empty": b"", "foreign": b"\x80\x04garbage"}[damage]
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        DataError, match=r"tokenizer.model is damaged or not a sentencepiece model\. Copy the model's file again"
    ):
        load_tokenizer(folder)


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere holds no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_a_folder_that_only_transformers_can_load(tokenizer: Path, assets: Path, tmp_path: Path) -> None:
    for file in (assets / "tokenizers" / "gpt2").iterdir():
        shutil.copy(file, tmp_path)
    write(tmp_path, config={"model_type": "gpt2"})
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("def f(x):\n    return x").ids) == "def f(x):\n    return x"
    check_tokenizer(tmp_path, 50257)
