"""Local tokenizers and chat templates, made here with the library that reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from replay.bodies import Prompt
from replay.history import Turn
from replay.prompts import WORDS
from replay.tokenizer import load_tokenizer

REAL = Path(os.environ.get("VLLM_CPU_HOME", Path.home() / ".cache" / "vllm-cpu")) / "tiny"

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}


def make_tokenizer(folder: Path, template: str | None = TEMPLATE, vocabulary: int = 4000) -> Path:
    """A byte-level BPE of our words, which is what today's models have; a small vocabulary has few words whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), " " + " ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TURNS = (Turn("hello world", "hello people", 0),)


@pytest.mark.parametrize(
    ("prompt", "chat", "tokens"),
    [
        (Prompt("hello world"), False, 1 + 2),  # <s>
        (Prompt("hello world time"), True, 2 + 3 + 2),  # <s> <|user|> ... </s> <|assistant|>
        (Prompt(" hello world "), True, 2 + 2 + 2),  # the template trims
        (Prompt("hello", TURNS), True, 2 + 2 + 1 + 1 + 2 + 1 + 1 + 1 + 2),
        (Prompt("hello", (Turn("hello world", " time people", 0),)), False, 1 + 4 + 1),
        (Prompt("hello " * 99_999 + "hello"), True, 100_004),
    ],
)
def test_counts(prompt: Prompt, chat: bool, tokens: int, made: Path) -> None:
    for path in (made, made / "tokenizer.json"):
        assert load_tokenizer(path, chat=chat).count(prompt) == tokens


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {**CONFIG, "chat_template": TEMPLATE}},
        {
            "tokenizer_config.json": {
                **CONFIG,
                "chat_template": [
                    {"name": "tool_use", "template": "{{ wrong"},
                    {"name": "default", "template": TEMPLATE},
                ],
            }
        },
        # The file of its own comes first.
        {"tokenizer_config.json": {**CONFIG, "chat_template": "{{ wrong"}, "chat_template.jinja": TEMPLATE},
    ],
)
def test_places_of_a_template(files: dict[str, Any], tmp_path: Path, made: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert load_tokenizer(tmp_path, chat=True).count(Prompt("hello world")) == 6


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        # What Hugging Face's environment has: blocks trimmed, loop controls, filters, functions, the generation block.
        ("{% if true %}\n  a{% endif %}\n", "  a"),
        ("{% for m in messages %}{% break %}{% endfor %}b", "b"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é<"}]'),
        ("{% generation %}c{% endgeneration %}", "c"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ bos_token }}{{ pad_token }}{{ tools is none }}", "<s>True"),
        # A template that looks at the text: rendered whole each time.
        ("{% if 'é' in messages[0].content %}d{% else %}ee{% endif %}{{ messages[0].content }}", "dé<"),
    ],
)
def test_templates(template: str, rendered: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = make_tokenizer(tmp_path, template)
    expected = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(rendered, add_special_tokens=False).ids)
    assert load_tokenizer(folder, chat=True).count(Prompt("é<")) == expected


REFUSING = "{% if messages | length > 1 %}{{ raise_exception('one message\\n only') }}{% endif %}x"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json: expected a tokenizer as Hugging Face's: "),
        ({"tokenizer.json": "\ud800"}, "tokenizer.json: expected UTF-8"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: expected JSON: "),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: expected a JSON object, got list"),
        ({"chat_template.jinja": None}, "expected a chat template in chat_template.jinja or tokenizer_config.json"),
        ({"chat_template.jinja": "{% if %}"}, "chat_template.jinja: expected a chat template: "),
        ({"chat_template.jinja": "{{ nothing.at.all }}"}, "the chat template fails: "),
        ({"chat_template.jinja": "{{ raise_exception('no\n way') }}"}, "the chat template fails: no way"),
        ({"chat_template.jinja": "{{ messages.clear() }}"}, "the chat template fails: "),  # it may change nothing
        ({"chat_template.jinja": "{{ ''.__class__.__mro__ }}"}, "the chat template fails: "),
    ],
)
def test_wrong_files(files: dict[str, str | None], message: str, tmp_path: Path, made: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    for name, content in files.items():
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path, chat=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_tokenizer_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"expected a tokenizer.json, or a folder with one"):
            load_tokenizer(path, chat=False)


def test_a_template_that_refuses_turns(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, REFUSING), chat=True)
    assert tokenizer.count(Prompt("hello")) >= 1
    with pytest.raises(ValueError, match="the chat template fails: one message only"):
        tokenizer.count(Prompt("hello", TURNS))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no model at {REAL} (VLLM_CPU_HOME)")
def test_a_real_models_files() -> None:
    """<|user|> and <|assistant|> around a text of the words that its tokenizer knows."""
    assert load_tokenizer(REAL, chat=True).count(Prompt("hello world burst trace")) == 6
    assert load_tokenizer(REAL, chat=False).count(Prompt("hello world burst trace")) == 4
