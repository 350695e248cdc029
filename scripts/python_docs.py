"""Write docs/reference/python.md anew: the docstrings of the public names, and the comments beside their fields.

Those comments have the shapes, units and bounds; a generator that reads docstrings only would leave them out.
"""

from __future__ import annotations

import ast
import enum
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from typing import Any

from generated import DOCS, write

import nanovllm
from nanovllm import testing

PAGE = DOCS / "reference" / "python.md"
WIDTH = 100  # of a signature; a longer one has a line for each parameter


@dataclass(frozen=True)
class Section:
    title: str
    about: str
    module: str
    names: tuple[str, ...]
    with_methods: bool = True


CALLERS = ("LLM", "AsyncLLM", "SamplingParams", "Request", "Output", "Completion", "Delta", "Finish")
ERRORS = (
    "NanoVLLMError", "ConfigError", "RequestError", "PromptTooLong", "PluginError", "ModelError",
    "UnsupportedModelError", "TokenizerError", "RunnerError", "RunnerDead", "RequestFailed", "EngineDead",
    "EngineClosed",
)  # fmt: skip
BORDER = (
    "RunnerInfo", "Paged", "Lanes", "Remote", "Batch", "ScheduledSeq", "Packed", "Sampling", "SeqOutput",
    "TokenLogprob", "SampleRow", "Sampled",
)  # fmt: skip
MODELS = (
    "load_checkpoint", "Checkpoint", "Tensor", "model_len", "num_kv_blocks", "Config", "DecoderSpec", "Block",
    "Attention", "Norm", "FeedForward", "Experts", "Rotary", "Linear", "Llama3", "Yarn", "LongRope", "DynamicNTK",
    "Alibi", "rotary_frequencies", "alibi_bias",
)  # fmt: skip
SECTIONS = (
    Section("Asking", "From `nanovllm`, as is `__version__`.", "nanovllm", CALLERS),
    Section(
        "Errors",
        "From `nanovllm`, and `PromptTooLong` and `RunnerDead` from `nanovllm.errors`. A command that ends in one has "
        "its exit status.",
        "nanovllm.errors",
        ERRORS,
    ),
    Section("Times and statistics of a request", "In `Completion.stats`.", "nanovllm.request", ("RequestStats",)),
    Section(
        "Statistics of the engine",
        "From `nanovllm.stats`: what `LLM.stats()` and `LLM.health()` return, and what observers get.",
        "nanovllm.stats",
        ("EngineStats", "Health", "StepStats", "Phase", "KvBlocks"),
    ),
    Section(
        "Plugin objects",
        "From `nanovllm.hookspecs`. [Plugins](../plugins.md) says how they are found.",
        "nanovllm.hookspecs",
        ("Specs", "Context", "CacheOptions"),
    ),
    Section(
        "Runners",
        "From `nanovllm.runner`; a runner subclasses one of the two.",
        "nanovllm.runner",
        ("ModelRunner", "LogitsRunner", "Sampler"),
    ),
    Section(
        "What crosses the border",
        "From `nanovllm.batch`: what a runner says about itself, gets in a step and answers, and what a sampler gets.",
        "nanovllm.batch",
        BORDER,
    ),
    Section("Tokenizers", "From `nanovllm.tokenizer`.", "nanovllm.tokenizer", ("Tokenizer", "checked_messages")),
    Section(
        "Models as data",
        "From `nanovllm_models`, which comes with every runner that reads checkpoints: for such runners, and for model "
        "families.",
        "nanovllm_models",
        MODELS,
    ),
    Section(
        "Testing a plugin",
        "From `nanovllm.testing`, with `nanovllm[testing]`. [Conformance](../conformance.md) has examples.",
        "nanovllm.testing",
        tuple(testing.__all__),
        with_methods=False,  # they are tests
    ),
)


ENTRIES = {name for section in SECTIONS for name in section.names}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def markdown() -> str:
    out = []
    for section in SECTIONS:
        out += [f"## {section.title}", section.about]
        module = import_module(section.module)
        for name in section.names:
            out += entry(name, getattr(module, name), section.with_methods)
    return "\n\n".join(out) + "\n"


def entry(name: str, thing: Any, with_methods: bool) -> Iterator[str]:
    """A heading, the signature, the docstring; of a class its fields and methods, too."""
    yield f"### {name}"
    if not inspect.isclass(thing):
        yield code(signature(parsed(thing), name))
        yield documented(name, thing)
        return
    node = parsed(thing)
    bases = ", ".join(ast.unparse(base) for base in node.bases if ast.unparse(base) != "EngineFace")
    constructor = next((own(c, "__init__") for c in lineage(thing) if own(c, "__init__")), None)
    if constructor is not None and not issubclass(thing, Exception):
        yield code(signature(constructor, name))
    else:
        yield code(f"class {name}({bases})" if bases else f"class {name}")
    yield documented(name, thing)
    if constructor is not None and (text := ast.get_docstring(constructor)):
        yield prose(text)
    if issubclass(thing, nanovllm.NanoVLLMError):
        yield f"Exit status {thing.exit_code}."
    rows = [row for part in reversed(lineage(thing)) for row in fields(part)]
    if rows:
        columns = ("member", "", "value", "") if issubclass(thing, enum.Enum) else ("field", "type", "default", "")
        kept = [i for i in range(4) if any(row[i] for row in rows)]
        yield "\n".join(f"| {' | '.join(row[i] for i in kept)} |" for row in (columns, ("---",) * 4, *rows))
    for method, definition in methods(thing).items() if with_methods else ():
        yield f"#### {name}.{method}"
        kinds = {ast.unparse(d) for d in definition.decorator_list}
        if kinds & {"property", "cached_property"}:
            assert definition.returns is not None
            yield code(f"{method}: {ast.unparse(definition.returns)}")
        else:
            yield code(signature(definition, f"{name}.{method}" if "classmethod" in kinds else method))
        yield documented(f"{name}.{method}", inspect.getattr_static(thing, method))


def parsed(thing: Any) -> Any:
    """The syntax tree of a class or a function."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def lineage(thing: type) -> list[type]:
    """The class and those of its bases that have no entry of their own."""
    others = ENTRIES - {thing.__name__}
    return [c for c in thing.__mro__ if c.__module__.startswith("nanovllm") and c.__name__ not in others]


def own(thing: type, name: str) -> Any:
    """The definition of a function in this very class."""
    return next((n for n in parsed(thing).body if isinstance(n, FUNCTIONS) and n.name == name), None)


def methods(thing: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in lineage(thing):
        for node in parsed(part).body:
            if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
                found.setdefault(node.name, node)
    return found


def fields(thing: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, the comment beside it or the string below it) of what a class declares in its body."""
    source = textwrap.dedent(inspect.getsource(thing))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    out = []
    body = parsed(thing).body
    for node, following in zip_longest(body, body[1:]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            name, kind, value = node.target.id, ast.unparse(node.annotation), node.value
            kind = kind.removeprefix("ClassVar[").removesuffix("]") if kind.startswith("ClassVar[") else kind
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            name, kind, value = node.targets[0].id, "", node.value
        else:
            continue
        default = "" if value is None else ast.unparse(value)
        if default.startswith("field("):
            default = f"{default.removeprefix('field(default_factory=').removesuffix(')')}()"
        about = comments.get(node.end_lineno, "")
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            about = inspect.cleandoc(following.value.value).replace("\n", " ")
        out.append((f"`{name}`", ticked(kind), ticked(default), cell(about)))
    return out


def signature(node: Any, name: str) -> str:
    """`name(parameters) -> type`, without self; over several lines if one is too short."""
    start = f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}{name}("
    end = ")" if node.returns is None or node.name == "__init__" else f") -> {ast.unparse(node.returns)}"
    each = list(parameters(node.args))
    line = start + ", ".join(each) + end
    return line if len(line) <= WIDTH else start + "".join(f"\n    {one}," for one in each) + "\n" + end


def parameters(arguments: ast.arguments) -> Iterator[str]:
    plain = arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(plain, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for i, (argument, default) in enumerate(pairs):
        if i == len(plain):
            yield "*"
        if argument.arg not in ("self", "cls"):
            yield ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")
    if arguments.kwarg:
        yield "**" + ast.unparse(arguments.kwarg)


def documented(name: str, thing: Any) -> str:
    """A docstring, whose indented parts are code in Markdown already; a method without one has that of its base."""
    text = thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(getattr(thing, "__func__", thing))
    if not text:
        raise SystemExit(f"{name} has no docstring")
    return prose(text)


def prose(text: str) -> str:
    """With links to the pages and the errors that it names."""
    text = re.sub(r"\bdocs/([\w/-]+)\.md", r"[\1](../\1.md)", inspect.cleandoc(text))
    return re.sub(rf"(?<![`\w])({'|'.join(ERRORS)})(?![`\w])", lambda m: link(m[1], m[1]), text)


def code(text: str) -> str:
    return f"```py\n{text}\n```"


def link(text: str, name: str) -> str:
    return f"[{text}](#{name.lower()})"


def ticked(text: str) -> str:
    """Code in a cell of a table; a link if it is the name of an entry."""
    word = f"`{cell(text)}`" if text else ""
    return link(word, text) if text in ENTRIES else word


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write(PAGE, markdown())
