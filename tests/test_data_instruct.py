"""Files of instructions, chats, prompts and texts; chat templates against `transformers`."""

import datetime
import doctest
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from data import chat, instruct
from data.chat import ChatTemplate
from data.written import Piece, Written

SHARED = Path(__file__).parents[1] / "../shared/data/instruct"


def refuses(message: str, function, *args, **options) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


LLAMA3 = """{{ bos_token }}
{%- set first = messages[0].role == 'system' %}
{%- set system = messages[0]['content'] | trim if first else 'Be brief.' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- for tool in tools or [] %}{{ tool | tojson(indent=4) }}{% endfor %}
{{- system ~ '<|eot_id|>' }}
{%- for m in (messages[1:] if first else messages) %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
{{ '<|im_start|>' + message.role }}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}
{% else %}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% set users = loop.index0 % 2 == 0 %}
{% if (message.role == 'user') != users %}{{ raise_exception('take turns') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# Thoughts of earlier turns are left out, as Qwen3 does.
FORGETFUL = """{% for m in messages %}<{{ m.role }}>
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}</s>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
TEMPLATES = {
    "llama3": (LLAMA3, ["2<|eot_id|>", "3<|eot_id|>"]),
    "chatml": (CHATML, ["2<|im_end|>\n", "3\n<|im_end|>\n"]),
    "mistral": (MISTRAL, [" 2</s>", " 3\n</s>"]),
    "gemma": (GEMMA, ["2<end_of_turn>\n", "3<end_of_turn>\n"]),
}


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


SYSTEM = {"role": "system", "content": " You <b>answer</b>. "}
TWO = turns("1 + 1?", "2", " Größer & \n<i>als</i> 2? ", "3\n")
CONVERSATIONS = [turns("Hello"), turns("Hello", "Hi"), TWO, [SYSTEM, *TWO], [SYSTEM, *TWO[:3]]]


def hugging_face(source: str, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)
    found.chat_template = source
    return found


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("family", TEMPLATES)
def test_text_is_that_of_transformers(family, messages, generate):
    theirs = hugging_face(TEMPLATES[family][0], bos_token="<s>", eos_token="</s>")
    ours = ChatTemplate(TEMPLATES[family][0], "<s>", "</s>")
    if family in ("mistral", "gemma") and messages[0] == SYSTEM:
        refuses("template refuses the messages of roles system", ours.render, messages, generate)
        return
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert ours.render(messages, generate) == want


ODD = {
    "undefined token": "{{ bos_token }}|{{ eos_token is defined }}|{{ messages[0].content }}",
    "null is absent": "{{ messages[0].name is defined }}{{ tools is none }}{{ documents is none }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "sorted json": "{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}",
    "break": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "last line": "{{ messages[0].content }}\n\n",
    "blanks": "  {% if true %}  \n  a {% endif %}\n   {# none #}\n b",
    "year": "{{ strftime_now('%Y') }}{{ strftime_now is defined }}",
    "generation": "  {% generation %}\n {{ messages[0].content }}{% endgeneration %}\n x",
    "namespace": "{% set n = namespace(a=0) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(a=1) }}",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_templates_are_rendered_as_transformers_does(name):
    messages = [{"role": "user", "content": "é<&'\"", "name": None}, *turns("b", "c")]
    want = hugging_face(ODD[name]).apply_chat_template(messages, tokenize=False)
    assert ChatTemplate(ODD[name]).render(messages) == want


def test_tools_variables_and_the_clock_reach_the_template():
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "description": "<sum>"}}]
    source = "{{ mood }}" + LLAMA3
    theirs = hugging_face(source, bos_token="<s>")
    want = theirs.apply_chat_template(TWO, tools=tools, tokenize=False, mood="calm")
    template = ChatTemplate(source, "<s>", variables={"mood": "calm"})
    assert template.render(TWO, tools=tools) == want == template.written(TWO, tools=tools).text
    assert '"description": "<sum>"' in str(want) and str(want).startswith("calm")
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=datetime.datetime(2024, 7, 26))
    assert dated.render(TWO) == "26 Jul 2024"
    assert pickle.loads(pickle.dumps(template)).render(TWO, tools=tools) == want


@pytest.mark.parametrize("family", TEMPLATES)
def test_answers_are_learned_with_the_end_of_their_turn(family):
    source, learned = TEMPLATES[family]
    template = ChatTemplate(source, "<s>", "</s>")
    written = template.written(TWO, "f:3")
    assert written.text == template.render(TWO)
    assert [piece.text for piece in written.pieces if piece.learned] == learned
    assert [piece.learned for piece in written.pieces] == [False, True] * 2
    assert written.prompt == template.render(TWO[:3], add_generation_prompt=True)
    assert (written.references, written.origin) == (("3\n",), "f:3")


def test_what_is_around_answers_is_not_learned():
    template = ChatTemplate(CHATML)
    written = template.written(TWO[:3])
    assert [piece.learned for piece in written.pieces] == [False, True, False]
    assert written.text == template.render(TWO[:3]) and written.references == ()
    in_a_row = [*turns("a", "b"), {"role": "assistant", "content": "c"}]
    learned = [piece.text for piece in template.written(in_a_row).pieces[1::2]]
    assert learned == ["b<|im_end|>\n", "c<|im_end|>\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    messages = turns("a", "<think>hm</think>b", "c", "<think>so</think>d")
    with pytest.raises(ValueError) as caught:
        ChatTemplate(FORGETFUL).written(messages, "chats.jsonl:7")
    said = str(caught.value)
    assert "chats.jsonl:7: chat template is not consistent: up to message 1 it writes" in said
    assert "'<think>hm</think>b</s>'" in said and "has 'b</s><user>c" in said
    assert "turns='last'" in said
    assert ChatTemplate(FORGETFUL).written(messages[:2]).pieces[1].text == "<think>hm</think>b</s>"
    written = ChatTemplate(FORGETFUL, turns="last").written(messages)
    assert written.pieces == (
        Piece("<user>a</s><assistant>b</s><user>c</s><assistant>", False),
        Piece("<think>so</think>d</s>"),
    )


def test_other_templates_and_chats_that_teach_nothing_are_refused():
    tail = CHATML + "{% if not add_generation_prompt %}<end>{% endif %}"
    end = "f:1: chat template is not consistent: up to message 1 it writes 'end>'"
    refuses(end, ChatTemplate(tail).written, TWO, "f:1")
    thinking = CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}")
    think = "with its generation prompt before message 1 it writes '<think>'.*variables="
    refuses(think, ChatTemplate(thinking).written, TWO)
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    refuses("writes nothing for the answer 1", ChatTemplate(silent).written, TWO)
    template = ChatTemplate(CHATML)
    refuses("f:1: no message of role 'assistant'", template.written, turns("a"), "f:1")
    refuses("f:1: the first message is the assistant's.*remove", template.written, TWO[1:], "f:1")
    refuses("no messages; give at least one", template.render, [])
    last = ChatTemplate(CHATML, turns="last").written(TWO[1:])
    assert [piece.learned for piece in last.pieces] == [False, True]


UNSAFE = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "clock": "{{ strftime_now.__globals__['datetime'] }}",
    "change": "{{ messages.append(1) }}",
    "change of one": "{{ messages[0].update(role='system') }}",
    "file": "{% include '/etc/passwd' %}",
    "size": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "type": "{{ messages + 1 }}",
    "own error": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", UNSAFE)
def test_templates_stay_in_the_sandbox(name):
    template = ChatTemplate(UNSAFE[name], origin="m/chat_template.jinja")
    refuses("^m/chat_template.jinja refuses .* of roles user", template.render, turns("a"))
    refuses("^f:9: m/chat_template.jinja refuses", template.written, turns("a", "b"), "f:9")


def test_what_the_sandbox_hides_is_nothing_and_what_is_no_template_is_refused():
    hidden = "{{ '{0.__class__}'.format(messages) }}{{ '' | attr('__class__') }}"
    hidden += "{{ strftime_now.__globals__ }}{{ lipsum.__globals__ }}{{ self.__init__ }}"
    assert ChatTemplate(hidden).render(TWO) == ""
    refuses(r"t.jinja:2: .*unknown tag 'endfor'", ChatTemplate, "a\n{% endfor %}", origin="t.jinja")
    deep = "{% for a in b %}" * 30 + "{% endfor %}" * 30
    refuses("t.jinja: not a template", ChatTemplate, deep, origin="t.jinja")
    refuses("turns='first' is unknown; choose from all, last", ChatTemplate, CHATML, turns="first")
    taken = {"messages": [], "eos_token": "x", "a": 1}
    refuses("variables has eos_token, messages", ChatTemplate, CHATML, variables=taken)


def checkpoint(folder: Path, **settings) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_templates_are_read_as_transformers_reads_them(tmp_path):
    theirs = hugging_face(MISTRAL, bos_token="<s>", eos_token="</s>", pad_token="<p>")
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    beside = tmp_path / "chat_template.jinja"
    assert beside.is_file() and "chat_template" not in settings

    def equal(**changed) -> str:
        checkpoint(tmp_path, **settings | changed)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        text = chat.load(tmp_path).render(TWO)
        assert text == theirs.apply_chat_template(TWO, tokenize=False)
        return text

    assert equal().startswith("<s>[INST] 1 + 1? [/INST] 2</s>")
    described = {"content": "<begin>", "lstrip": False, "__type": "AddedToken"}
    assert equal(bos_token=described).startswith("<begin>[INST]")
    assert equal(chat_template="never {{ pad_token }}").startswith("<s>[INST]")
    beside.unlink()
    assert equal(chat_template="{{ pad_token }} {{ sep_token }}") == "<p> "
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "{{ eos_token }}d"}]
    assert equal(chat_template=named) == "</s>d"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<older>"}}')
    assert equal(chat_template=named) == "<older>d"
    assert equal(chat_template=named, added_tokens_decoder={}) == "</s>d"
    checkpoint(tmp_path, chat_template="{{ mood }}{{ pad_token }}", pad_token="<p>")
    template = chat.load(tmp_path, variables={"mood": "calm"}, turns="last")
    assert template.render(TWO) == "calm<p>" and template.turns == "last"


BAD_FOLDERS = [
    (b"{}", r"has no chat template.*Pass the folder of the model's chat variant"),
    (b'{"chat_template": [{"name": "rag", "template": ""}]}', r"is named 'default'; .*'rag'"),
    (b'{"chat_template": []}', r"is named 'default'; there are none"),
    (b'{"chat_template": 3}', r"tokenizer_config.json: 'chat_template' is neither a text nor"),
    (b'{"chat_template": [{"name": "default"}]}', r"'chat_template' is neither a text nor a list"),
    (b'{"chat_template": "", "bos_token": 3}', r"config.json: 'bos_token' is 3; give a text or"),
    (b'{"chat_template": "", "eos_token": {}}', r"'eos_token' is {}; give a text or"),
    (b'{"chat_template": "a\\n{% if %}"}', r"tokenizer_config.json:2: Expected an expression"),
    (b'{\n"a"', r"tokenizer_config.json:2: malformed JSON"),
    (b"[]", r"tokenizer_config.json: expected an object, found '\[\]'"),
    (b'{"a": "\xff"}', r"tokenizer_config.json: byte 7 is not utf-8"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FOLDERS)
def test_a_bad_folder_says_what_to_do(content, message, tmp_path):
    refuses("absent has no chat template", chat.load, tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    refuses(message, chat.load, tmp_path)


def lines(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(file: Path, **options) -> list[Written]:
    return instruct.load(file, dev=0, test=0, **options).splits["train"]


def test_alpaca_records_have_the_published_prompts(tmp_path):
    file = lines(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "ignored"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Sing.", "input": None, "output": "Li", "answer": "ignored"},
        {"instruction": "Rhyme", "instances": [{"input": "a", "output": "b"}, {"output": "c"}]},
    )
    one, two, three, four, five = read(file)
    write = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert one.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides "
        f"further context. {write}Add.\n\n### Input:\n2, 2\n\n### Response:"
    )
    below = "Below is an instruction that describes a task. "
    assert two.prompt == f"{below}{write}Sing.\n\n### Response:"
    assert two.prompt == three.prompt == instruct.alpaca_prompt("Sing.")
    assert one.pieces == (Piece(one.prompt, False), Piece("4"))
    assert one.references == ("4",) and one.origin == f"{file}:1"
    assert four.prompt == instruct.alpaca_prompt("Rhyme", "a")
    assert (five.prompt, five.references) == (instruct.alpaca_prompt("Rhyme"), ("c",))
    assert five.origin == f"{file}:4"


def test_prompts_questions_texts_and_a_chosen_format(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4", "id": 1})
    assert read(file) == [Written((Piece("2 + 2 =", False), Piece(" 4")), (" 4",), f"{file}:1")]
    lines(file, {"question": "2 + 2?", "answer": "4"}, {"question": "", "answer": "5"})
    asked = (Piece("Question: 2 + 2?\nAnswer:", False), Piece(" 4"))
    assert read(file)[0] == Written(asked, ("4",), f"{file}:1")
    lines(file, {"text": "a\nb"}, {"text": "c", "meta": {"a": 1}})
    assert [text.pieces for text in read(file)] == [(Piece("a\nb"),), (Piece("c"),)]
    lines(file, {"messages": None, "prompt": "a", "completion": "b", "conversations": None})
    assert read(file)[0].text == "ab"
    record = {"text": "a", "prompt": "b", "completion": "c"}
    lines(file, record)
    assert read(file)[0].text == "bc"
    assert read(file, format="text")[0].text == "a"
    refuses("l:1: .*'text', 'prompt', .* of no 'alpaca' record", read, file, format="alpaca")
    records = lines(tmp_path / "records.txt", record)
    assert read(records, format="prompt")[0].text == "bc"
    assert read(records)[0].text == records.read_text()


def test_chats_are_written_by_the_template(tmp_path):
    template = ChatTemplate(CHATML)
    want = template.written([SYSTEM, *TWO])
    file = lines(tmp_path / "m.jsonl", {"messages": [SYSTEM, *TWO]})
    assert read(file, template=template) == [want._replace(origin=f"{file}:1")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    said = [{"from": names[m["role"]], "value": m["content"]} for m in (SYSTEM, *TWO)]
    system = SYSTEM["content"]
    lines(file, {"conversations": said}, {"conversations": said[1:], "system": system, "id": 3})
    assert [text.pieces for text in read(file, template=template)] == [want.pieces] * 2
    checkpoint(tmp_path, chat_template=CHATML)
    assert read(file, template=str(tmp_path))[0].pieces == want.pieces


def test_tools_of_a_chat_reach_the_template(tmp_path):
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    answer = [called, {"role": "tool", "content": "2"}, {"from": "gpt", "value": "2"}]
    record = {"messages": [*TWO, TWO[0], *answer], "tools": [{"name": "add"}]}
    source = "{{ tools[0].name }}:{% for m in messages %}<{{ m.role }}>"
    source += "{{ m.content or m.tool_calls[0].name }}</s>{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (written,) = read(lines(tmp_path / "m.jsonl", record), template=ChatTemplate(source))
    assert written.text.startswith("add:<user>1 + 1?</s><assistant>2</s>")
    assert [piece.text for piece in written.pieces][-3::2] == ["add</s>", "2</s>"]


def test_with_a_template_instructions_become_chats(tmp_path):
    template, file = ChatTemplate(CHATML), tmp_path / "a.jsonl"
    want = template.written(turns("Add.\n\n2, 2", "4"), f"{file}:1")
    for record in (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"question": "Add.\n\n2, 2", "answer": "4"},
        {"prompt": "Add.\n\n2, 2", "completion": "4"},
    ):
        assert read(lines(file, record), template=template) == [want]
    lines(file, {"text": "a"})
    refuses("a.jsonl:1: format 'text' has no turns for", read, file, template=template)


def test_lists_lines_and_gzip(tmp_path):
    records = [{"text": "é,]\n"}, {"text": "["}, {"text": "}"}]
    by_line = "\ufeff" + "\r\n\r\n".join(json.dumps(record) for record in records)
    for name, text, at in (
        ("a.json", json.dumps(records, indent=1), [2, 5, 8]),
        ("b.json", f"\n{json.dumps(records, ensure_ascii=False)}\n", [2, 2, 2]),
        ("c.jsonl", by_line, [1, 3, 5]),
        ("d.json", by_line, [1, 3, 5]),
    ):
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"z{name}.gz").write_bytes(gzip.compress(text.encode()))
        for file in (tmp_path / name, tmp_path / f"z{name}.gz"):
            found = read(file)
            assert [text.text for text in found] == [record["text"] for record in records]
            assert [text.origin for text in found] == [f"{file}:{line}" for line in at]
    assert read(tmp_path / "za.json") == read(tmp_path / "za.json.gz")


def test_one_text_per_file(tmp_path):
    for folder in ("deep", ".git"):
        (tmp_path / folder).mkdir()
    for name, content in {
        "b.md": b"# B\n",
        "a.txt": "caf\xe9\r\n".encode("latin-1"),
        "deep/c.py": b"c = 1\n",
        "deep/__init__.py": b"\n",
        "deep/d.PY.gz": gzip.compress(b"d = 1\n"),
        "deep/e.css": b"e {}\n",
        ".git/f.txt": b"f",
    }.items():
        (tmp_path / name).write_bytes(content)
    found = read(tmp_path, encoding="latin-1")
    assert [text.text for text in found] == ["caf\xe9\r\n", "# B\n", "c = 1\n", "d = 1\n"]
    assert found[0].pieces == (Piece("caf\xe9\r\n"),)
    assert found[0].origin == f"{tmp_path / 'a.txt'}:1"
    assert len(read(tmp_path, extensions=("css", ".py"), encoding="latin-1")) == 3
    for name in ("package.json", "test.json"):
        (tmp_path / name).write_text("{}")
    assert read(tmp_path, encoding="latin-1", format="text") == found
    assert read(tmp_path / "b.md")[0].text == "# B\n"
    refuses(r"a.txt:1: byte 0xe9 is not utf-8; pass encoding=", read, tmp_path, format="text")


def counts(task) -> dict[str, int]:
    return {split: len(rows) for split, rows in task.splits.items()}


def test_a_folder_of_files_named_by_split(tmp_path):
    lines(tmp_path / "train.jsonl", *({"text": f"{i}"} for i in range(40)))
    lines(tmp_path / "validation.json", {"text": "a"})
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}'))
    (tmp_path / "README.md").write_text("not a text to learn")
    task = instruct.load(tmp_path)
    assert list(counts(task).items()) == [("train", 40), ("dev", 1), ("test", 1)]
    assert task.name == tmp_path.name
    (tmp_path / "validation.json").unlink()
    task = instruct.load(tmp_path, name="mine")
    assert counts(task) == {"train": 38, "dev": 2, "test": 1} and task.name == "mine"
    assert task.splits["test"][0].text == "b"
    assert counts(instruct.load(tmp_path, dev=0)) == {"train": 40, "test": 1}
    (texts := tmp_path / "texts").mkdir()
    for split in ("train", "valid", "other"):
        (texts / f"{split}.txt").write_text(split)
    splits = instruct.load(texts, test=0).splits
    assert {split: row.text for split, (row,) in splits.items()} == dict(train="train", dev="valid")
    (texts / "valid.txt").unlink()
    assert [text.text for text in read(texts)] == ["other", "train"]


def test_shares_are_held_out_by_the_hash_of_the_text(tmp_path):
    records = [{"text": f"text {i % 100}"} for i in range(150)]
    splits = instruct.load(lines(tmp_path / "a.jsonl", *records)).splits
    texts = {split: {row.text for row in rows} for split, rows in splits.items()}
    assert {s: len(t) for s, t in texts.items()} == {"train": 90, "dev": 5, "test": 5}
    assert sum(len(rows) for rows in splits.values()) == 150
    assert len(texts["train"] | texts["dev"] | texts["test"]) == 100
    other = instruct.load(lines(tmp_path / "b.jsonl", *records[::-1])).splits
    assert {split: {row.text for row in rows} for split, rows in other.items()} == texts
    lone = instruct.load(tmp_path / "a.jsonl", dev=0, test=0.1).splits
    assert list(lone) == ["train", "test"] and {row.text for row in lone["test"]} > texts["test"]
    places = [int(row.origin.rpartition(":")[2]) for row in splits["train"]]
    assert places == sorted(places)
    # The smallest digests of the texts "0" .. "19", as `sha256sum` prints them: 9, 8, 13, 17.
    file = lines(tmp_path / "c.jsonl", *({"text": f"{i}"} for i in range(20)))
    splits = instruct.load(file, dev=0.1, test=0.1).splits
    assert [row.text for row in splits["test"]] == ["8", "9"]
    assert [row.text for row in splits["dev"]] == ["13", "17"]


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"format": "csv"}, "format='csv' is unknown; choose from auto, messages"),
    ({"dev": 1.0}, r"dev=1.0 is outside \[0, 1\)"),
    ({"test": -0.1}, r"test=-0.1 is outside \[0, 1\)"),
    ({"dev": 0.5, "test": 0.5}, "dev=0.5 and test=0.5 leave nothing"),
    ({"extensions": ".py"}, "extensions='.py' are no list"),
    ({"extensions": ()}, r"extensions=\(\) are no list"),
    ({"encoding": "utf-9"}, "encoding='utf-9' is unknown"),
    ({}, r"a.jsonl: test=0.05 and dev=0.05 of 2 distinct texts leaves a split empty"),
    ({"dev": 0.4, "test": 0.4}, "test=0.4 and dev=0.4 of 2 distinct texts"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_are_checked(options, message, tmp_path):
    file = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": "a"})
    refuses(message, instruct.load, file, **options)


MIXED = r"f.json:2: .* of no 'text' record, the format chosen by the first record, .*f.json:1; all"
FILES: list[tuple[str | bytes, str]] = [
    ("", r"f.json: the file is empty"),
    ("[ ]", r"f.json: the list is empty"),
    ('{"text": "a"}\n{"text": \n', r"f.json:2: malformed JSON.*one object per line"),
    ('[{"text": "a"},\n{"text"}]', r"f.json:2: malformed JSON \(Expecting ':'"),
    ('[{"text": "a"},\n]', r"f.json:\d: malformed JSON"),
    ('[{"text": "a"}]\n[]', r"f.json:2: malformed JSON \(Extra data"),
    ('{\n"text": "a"}', r"f.json:1: malformed JSON"),
    ('{"text": "a"}\n3\n', r"f.json:2: expected an object, found '3'"),
    ('[\n["a"]]', r"f.json:2: expected an object"),
    ("[" * 100_000, r"f.json:1: JSON beyond what is read"),
    ('{"text": ' + "1" * 5000 + "}", r"f.json:1: JSON beyond what is read"),
    (b'{"text": "a"}\n{"text": "\xff"}', r"f.json:2: byte 0xff is not utf-8"),
    ('{"body": "a", "n": 1}', r"f.json:1: the record's keys 'body', 'n' are those of no format"),
    ("{}", r"keys \(none\) are those of no format. The formats are messages: messages; shareg"),
    ('{"prompt": [], "completion": "a"}', r":1: 'prompt' is '\[\]'.*'messages'"),
    ('{"text": 3}', r"f.json:1: 'text' is '3'; give a text$"),
    ('{"instruction": "a", "input": 3, "output": "b"}', r"f.json:1: 'input' is '3'"),
    ('{"instruction": "a", "instances": []}', r"f.json:1: 'instances' is no list"),
    ('{"instruction": "a", "instances": [{}]}', r":1: 'output' is 'None'; give a text"),
    ('{"prompt": "a", "completion": " "}', r"f.json:1: 'completion' is empty.*skip_empty"),
    ('{"text": "a\\ud83d"}', r"f.json:1: character '\\ud83d' is half of a pair"),
    ('{"messages": []}', r"f.json:1: format 'messages' is .*pass template="),
    ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', MIXED),
]


PARTS = [{"type": "image"}]
CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "a"}, r"f.json:1: 'messages' is no list of objects"),
    ({"messages": []}, r"'messages' is no list of objects"),
    ({"messages": ["a"]}, r"'messages' is no list of objects"),
    ({"messages": [{"speaker": "user"}]}, r"turn 0 has the keys 'speaker'; give role and"),
    ({"messages": [{"role": "narrator", "content": ""}]}, r"role 'narrator'; known are"),
    ({"messages": [{"role": 1, "content": ""}]}, r"turn 0 has role 1; known are"),
    ({"conversations": [{"from": "me", "value": ""}]}, r"turn 0 has from 'me'; known are"),
    ({"messages": [{"role": "user", "content": PARTS}]}, r"'content' of turn 0 is .*one text"),
    ({"messages": [{"role": "user"}]}, r"'content' of turn 0 is 'None'"),
    ({"messages": turns("a", " ")}, r"'messages\[1\]' is empty.*skip_empty"),
    ({"messages": turns("a")}, r"f.json:1: no message of role 'assistant'"),
    ({"messages": TWO, "tools": "[]"}, r"f.json:1: 'tools' is no list"),
    ({"messages": TWO, "system": 3}, r"f.json:1: 'system' is '3'"),
    ({"messages": [SYSTEM, *TWO]}, r"f.json:1: .* refuses .*: take turns"),
]


@pytest.mark.parametrize(("content", "message"), [*FILES, *CHATS], ids=range(len(FILES + CHATS)))
def test_bad_records_are_named_with_their_line(content, message, tmp_path):
    template = ChatTemplate(MISTRAL, "<s>", "</s>") if isinstance(content, dict) else None
    content = json.dumps(content) if isinstance(content, dict) else content
    file = tmp_path / "f.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(message, read, file, template=template)


def test_bad_paths_and_folders_are_named(tmp_path):
    refuses("absent: no such file or folder, and none with .gz", read, tmp_path / "absent")
    (tmp_path / "a.txt").write_text("\n")
    refuses("nor texts in .txt, .md, .py files", read, tmp_path)
    refuses("a.txt: the file is empty", read, tmp_path / "a.txt")
    (tmp_path / "a.md").write_text("a")
    refuses(r"no train.jsonl .*its files of records are \(none\)", read, tmp_path, format="alpaca")
    lines(tmp_path / "data.json", {"text": "a"})
    refuses("its files of records are data.json. Name them by split", read, tmp_path)
    lines(tmp_path / "dev.json", {"text": "a"})
    refuses("has dev.json but no train.jsonl", read, tmp_path)
    lines(tmp_path / "train.json", {"prompt": "a", "completion": "b"})
    refuses("dev.json:1: .* no 'prompt' record.*train.json:1", read, tmp_path)
    lines(tmp_path / "valid.jsonl", {"text": "a"})
    refuses("dev.json and valid.jsonl are both split 'dev'", read, tmp_path)
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    for content in (b"plain", whole[:-9], whole[:12] + b"\xff" * 20):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        refuses("a.jsonl.gz: not a whole gzip file", read, tmp_path / "a.jsonl.gz")


def test_records_without_an_answer_can_be_left_out(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"text": " "}, {"text": "a"})
    assert [text.text for text in read(file, skip_empty=True)] == ["a"]
    lines(file, {"messages": turns("a", "")}, {"messages": TWO})
    assert len(read(file, skip_empty=True, template=ChatTemplate(CHATML))) == 1
    lines(file, {"text": ""})
    refuses("split 'train' of task 'a' has no text", read, file, skip_empty=True)


PUBLISHED = {
    "instruction-data.json": (990, 55, 55),
    "code_alpaca_2k.json": (1813, 101, 101),
    "alpaca_seed_tasks.jsonl": (157, 9, 9),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    if name.startswith("code"):  # Two of its outputs are empty.
        refuses(r"code_alpaca_2k.json.gz:\d+: 'output' is empty", instruct.load, SHARED / name)
    task = instruct.load(SHARED / name, skip_empty=name.startswith("code"))
    assert tuple(counts(task).values()) == PUBLISHED[name] and task.name == name.split(".")[0]
    rows = read(SHARED / name, skip_empty=True)
    assert all(row.prompt.endswith("### Response:") for row in rows)
    as_chat = read(SHARED / name, template=ChatTemplate(CHATML), skip_empty=True)
    assert len(as_chat) == len(rows) == sum(PUBLISHED[name])
    if name == "instruction-data.json":
        assert rows[2].prompt == instruct.alpaca_prompt("Convert 45 kilometers to meters.")
        assert rows[2].references == ("45 kilometers is 45000 meters.",)
        assert rows[2].origin.endswith("instruction-data.json:12")
        assert sum("### Input:" in row.prompt for row in rows) == 1100 - 775


@pytest.mark.parametrize("module", [chat, instruct], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
