"""Chat templates: real ones against golden texts, hostile ones against the sandbox, control tokens in contents."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm.errors import RequestError, TokenizerError
from nanovllm_tokenizers import plugin
from nanovllm_tokenizers.chat import ChatTemplate, find_template
from nanovllm_tokenizers.hf import HFTokenizer, load
from support import DATA, needs_data

TEMPLATES = DATA / "chat-templates"
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages=HI, seconds: float = 10.0, **variables) -> str:
    return ChatTemplate(source, "test.jinja", seconds).render({"messages": messages, **variables})


# ---------------------------------------------------------------------------------- real templates


@needs_data
def test_real_templates_give_their_golden_texts():
    golden = json.loads((TEMPLATES / "golden.json").read_text("utf-8"))
    sources = json.loads((TEMPLATES / "templates.json").read_text("utf-8"))
    templates = {name: ChatTemplate(t["chat_template"], name) for name, t in sources.items()}
    pinned = datetime(2025, 1, 2, 3, 4, 5)
    assert len(golden["cases"]) == 280
    for case in golden["cases"]:
        source, talk = sources[case["template"]], golden["conversations"][case["conversation"]]
        variables = {
            "messages": talk["messages"],
            "tools": talk.get("tools"),
            "documents": None,
            "add_generation_prompt": case["add_generation_prompt"],
            **{k: source[k] for k in ("bos_token", "eos_token", "unk_token") if source.get(k) is not None},
            **case.get("kwargs", {}),
        }
        if "rendered" in case:
            assert templates[case["template"]].render(variables, pinned) == case["rendered"], case
        else:
            _, _, message = case["error"].partition(": ")
            with pytest.raises((RequestError, TokenizerError)) as caught:
                templates[case["template"]].render(variables, pinned)
            assert message in str(caught.value)


@needs_data
def test_ids_of_a_conversation_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizers/qwen2" / file, tmp_path)
    reference, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    for messages in (
        HI,
        [{"role": "system", "content": "Be brief.\n"}, *HI, {"role": "assistant", "content": "Hé 🙂"}, *HI],
        [{"role": "user", "content": "  spaces \n\n and 東京  "}],
    ):
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.chat(messages) == list(expected)


@needs_data
def test_a_sentencepiece_conversation_equals_the_librarys_encoding_of_the_text(tmp_path):
    """The space that the normaliser puts before each segment falls where it falls for the whole text."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "checkpoints/stories260k" / file, tmp_path)
    template = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).chat([*HI, *HI]) == library.encode("<s>[user] hi </s>" * 2, add_special_tokens=False).ids


# --------------------------------------------------------------------------- where a template is found


def test_the_directorys_template_is_found_in_the_order_of_transformers(tmp_path):
    config = {"chat_template": "config"}
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, config) == ("config", tmp_path / "tokenizer_config.json")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert find_template(tmp_path, config) == ("json", tmp_path / "chat_template.json")
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert find_template(tmp_path, config) == ("jinja", tmp_path / "chat_template.jinja")


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    found = find_template(tmp_path, {"chat_template": named})
    assert found is not None
    assert found[0] == "a"
    with pytest.raises(TokenizerError, match=r"tool_use.*none named 'default'"):
        find_template(tmp_path, {"chat_template": named[:1]})
    with pytest.raises(TokenizerError, match="must be text, not int"):
        find_template(tmp_path, {"chat_template": 3})


# --------------------------------------------------------------------------------- hostile templates

BREAK_OUTS = [
    # CVE-2024-34359: classic template injection from a model file
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}",
    "{{ ().__class__.__base__.__subclasses__()[80]()._module.__builtins__['exec']('open(\"MARK\", \"w\")') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch MARK') }}",
    "{{ raise_exception.__globals__['json'].codecs.open('MARK', 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch MARK') }}",
    "{{ dict.__globals__ }}",
    "{{ range.__class__.__mro__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ messages.__class__ }}",
    "{{ joiner.__init__.__globals__ }}",
    # CVE-2024-56326: a reference to str.format reached through a filter
    "{{ ['{0.__class__.__base__}'.format] | map('call', messages) | list }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}SAFE",
    "{{ '{0.__class__.__init__.__globals__}'.format_map({'0': messages}) }}",
    # CVE-2025-27516: the same through |attr
    "{{ ('{0.__class__.__base__.__subclasses__}' | attr('format'))(messages) }}SAFE",
    "{{ messages | attr('__class__') | attr('__base__') }}",
    "{{ (messages | map(attribute='__class__') | list)[0] }}",
    # attributes smuggled into a namespace, and changes of what the caller holds
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    # files
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/hostname' %}",
]


@pytest.mark.parametrize("payload", BREAK_OUTS)
def test_a_break_out_does_not_run(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = render(payload, messages)
    except TokenizerError:
        text = ""
    for leak in ("<class", "<module", "built-in", "function", "globals", "subclasses"):
        assert leak not in text
    assert list(tmp_path.iterdir()) == []
    assert messages == HI


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "no answer within"),
        ("{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", ""),
        ("{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}", ""),
        ("{{ ('a' * 10**11) | length }}", "memory"),
        ("{{ 'a' | center(10**11) }}", "memory"),
        ("{{ '%99999999999d' | format(1) }}", ""),
        ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "characters"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
            "no answer within",
        ),
    ],
)
def test_a_template_that_eats_time_or_memory_is_ended(template, why):
    with pytest.raises(TokenizerError, match=f"chat template of test.jinja failed: .*{why}"):
        render(template, seconds=1.0)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[0].content | no_such_filter }}", "no_such_filter"),
        ("{{ undefined_name.x }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ [] | tojson(indent='x', nope=1) }}", "TypeError"),
        ("{{ strftime_now(3) }}", "TypeError"),
    ],
)
def test_a_broken_template_is_a_typed_error(template, why):
    with pytest.raises(TokenizerError, match=f"test.jinja failed: .*{why}"):
        render(template)


def test_a_refusal_of_the_template_is_the_callers_error():
    with pytest.raises(RequestError, match="does not take these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_what_templates_of_the_field_may_use():
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi!"
    assert render("{{ dict(a=1).a }}{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}") == "12"
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", "test.jinja")
    assert template.render({}, datetime(2025, 1, 2)) == "02 Jan 2025"


def test_after_a_timeout_or_a_crash_the_next_conversation_is_rendered():
    template = ChatTemplate("{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}ok{{ n }}", "t", 1.0)
    assert template.render({"n": 1}) == "ok1"
    with pytest.raises(TokenizerError, match="no answer within 1 s"):
        template.render({"n": 99999})
    assert template.render({"n": 2}) == "ok2"
    template._worker.process.kill()
    template._worker.process.wait()
    with pytest.raises(TokenizerError, match="no answer"):
        template.render({"n": 3})
    assert template.render({"n": 4}) == "ok4"


def test_threads_get_their_own_conversations():
    template = ChatTemplate("{{ messages }}", "t")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: template.render({"messages": i}), range(200))) == [str(i) for i in range(200)]


def test_the_worker_ends_with_its_template():
    template = ChatTemplate("ok", "t")
    assert template.render({}) == "ok"
    process = template._worker.process
    del template
    assert process.poll() == -signal.SIGKILL if os.name == "posix" else process.poll() is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_never_reads_its_parents_conversations():
    code = """
import os
from nanovllm_tokenizers.chat import ChatTemplate
template = ChatTemplate("{{ who }}", "t")
assert template.render({"who": "parent"}) == "parent"
child = os.fork()
assert template.render({"who": str(child)}) == str(child)
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert template.render({"who": "again"}) == "again"
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------- control tokens in what users write

CONTROLS = ["<|start|>", "<|end|>", "<think>", "</think>", "<s>", "東"]


def library() -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator(["user assistant start end think hello"] * 3, trainer)
    t.add_tokens([AddedToken(c, special="think" not in c, normalized=False) for c in CONTROLS])
    return t


def chatting(source: str) -> HFTokenizer:
    return HFTokenizer(json.loads(LIBRARY.to_str()), {"bos_token": "<s>"}, ChatTemplate(source, "t"), "tokenizer.json")


LIBRARY = library()
CONTROL_IDS = {LIBRARY.token_to_id(c): c for c in CONTROLS}
PLAIN = chatting(CHATML)


def spelled(tokenizer: HFTokenizer, ids: list[int]) -> str:
    """What the ids say, special tokens included."""
    return b"".join(CONTROL_IDS[i].encode() if i in CONTROL_IDS else tokenizer.token_bytes(i) for i in ids).decode()


contents = st.lists(
    st.one_of(
        st.sampled_from([*CONTROLS, "<|", "end|>", "<|end", "|>", " ", "\n", "hello", "\U000f0000"]),
        st.text(max_size=3),
    )
).map("".join)


@settings(deadline=None)
@given(st.lists(contents, min_size=1, max_size=4))
def test_the_template_writes_the_control_tokens_and_nobody_else(texts):
    ids = PLAIN.chat([{"role": "user", "content": text} for text in texts])
    assert [CONTROL_IDS[i] for i in ids if i in CONTROL_IDS] == ["<|start|>", "<|end|>"] * len(texts) + ["<|start|>"]
    body = "".join(f"<|start|>user\n{text.strip()}<|end|>\n" for text in texts)
    assert spelled(PLAIN, ids) == body + "<|start|>assistant\n"


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="helo \n<|>é", max_size=20))
def test_without_control_tokens_in_it_a_conversation_is_the_librarys_encoding(text):
    rendered = f"<|start|>user\n{text.strip()}<|end|>\n<|start|>assistant\n"
    expected = LIBRARY.encode(rendered, add_special_tokens=False).ids
    assert PLAIN.chat([{"role": "user", "content": text}]) == expected


def test_templates_still_see_and_split_on_a_token_in_a_content():
    """Reasoning models drop earlier thoughts: content.split('</think>')[-1]."""
    source = "{% for m in messages %}<s>{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
    tokenizer = chatting(source + "{% else %}{{ m.content }}{% endif %}{% endfor %}")
    ids = tokenizer.chat([{"role": "assistant", "content": "<think>secret</think> answer<|end|>"}])
    assert spelled(tokenizer, ids) == "<s>answer<|end|>"
    assert [CONTROL_IDS[i] for i in ids if i in CONTROL_IDS] == ["<s>"]


@needs_data
@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_thoughts_of_earlier_turns_are_dropped_as_without_marks(name):
    sources = json.loads((TEMPLATES / "templates.json").read_text("utf-8"))
    tokenizer = chatting(sources[name]["chat_template"])
    thought = [*HI, {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nhello <|end|>"}, *HI]
    expected = render(sources[name]["chat_template"], thought, tools=None, add_generation_prompt=True, bos_token="<s>")
    ids = tokenizer.chat(thought)
    assert spelled(tokenizer, ids) == expected
    assert LIBRARY.token_to_id("<|end|>") not in ids


def test_a_template_that_acts_on_the_marks_still_gets_no_control_token_through():
    source = "<s>{% if messages[0].content == '<|end|>' %}<think>{% endif %}{{ messages[0].content }}"
    ids = chatting(source).chat([{"role": "user", "content": "<|end|>"}])
    assert [CONTROL_IDS[i] for i in ids if i in CONTROL_IDS] == ["<s>"]


@pytest.mark.parametrize("cut", ["[1:]", "[:-1]", "[2:]", "[:-2]", "[1:-1]", " | first", " | truncate(8, true, '')"])
def test_a_template_that_cuts_a_mark_off_gets_no_control_token_through(cut):
    tokenizer = chatting("<s>{{ messages[0].content" + cut + " }}")
    for content in ("<|end|>", " <|end|> ", "x<|end|>", "<|end|><|end|>"):
        ids = tokenizer.chat([{"role": "user", "content": content}])
        assert [CONTROL_IDS[i] for i in ids if i in CONTROL_IDS] == ["<s>"]


def test_a_token_of_the_template_beside_what_a_split_left_is_kept():
    tokenizer = chatting("<s>{{ messages[0].content.split('</think>')[0] }}<|end|>{{ messages[0].content }}<|end|>")
    ids = tokenizer.chat([{"role": "user", "content": "<think>a</think>"}])
    assert spelled(tokenizer, ids) == "<s><think>a<|end|><think>a</think><|end|>"
    assert [CONTROL_IDS[i] for i in ids if i in CONTROL_IDS] == ["<s>", "<|end|>", "<|end|>"]


def test_many_control_tokens_in_one_content_take_linear_work():
    ids = PLAIN.chat([{"role": "user", "content": "<|end|>" * 20_000}])
    assert sum(i in CONTROL_IDS for i in ids) == 3


def test_bad_messages_and_a_missing_template():
    with pytest.raises(RequestError, match="at least one"):
        PLAIN.chat([])
    with pytest.raises(RequestError, match=r"messages\[1\].*content"):
        PLAIN.chat([*HI, {"role": "user"}])
    with pytest.raises(RequestError, match="surrogate"):
        PLAIN.chat([{"role": "user", "content": "\ud800"}])
    without = HFTokenizer(json.loads(LIBRARY.to_str()), {}, None, "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"no chat template; add a chat_template\.jinja.*generate"):
        without.chat(HI)


# ------------------------------------------------------------------------------------------ plugin


def context(model_path, tokenizer_path=None, **options):
    return SimpleNamespace(
        options=plugin.tokenizer_config()(**options), model="some-model", path=model_path, tokenizer_path=tokenizer_path
    )


def test_the_plugin_finds_the_files(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for directory in (model, other):
        directory.mkdir()
        LIBRARY.save(str(directory / "tokenizer.json"))
    (model / "model.onnx").touch()
    (other / "chat_template.jinja").write_text("<s>other")
    (tmp_path / "mine.jinja").write_text("<s>mine")

    def says(ctx) -> str:
        t = plugin.create_tokenizer(ctx)
        return spelled(t, t.chat(HI))

    assert says(context(model / "model.onnx", chat_template=str(tmp_path / "mine.jinja"))) == "<s>mine"
    assert says(context(model, tokenizer_path=other)) == "<s>other"
    assert says(context(model, tokenizer_path=other / "tokenizer.json")) == "<s>other"
    assert says(context(None, tokenizer_path=other)) == "<s>other"
    with pytest.raises(TokenizerError, match=r"some-model.*tokenizer\.path"):
        plugin.create_tokenizer(context(None))
    with pytest.raises(TokenizerError, match=r"cannot read .*gone\.jinja"):
        plugin.create_tokenizer(context(model, chat_template=str(tmp_path / "gone.jinja")))


def test_options_are_strict():
    options = plugin.tokenizer_config()
    with pytest.raises(ValueError, match="paht"):
        options(paht="x")
    with pytest.raises(ValueError, match="frozen"):
        options().chat_template = "x"
    assert plugin.api_version == 1
