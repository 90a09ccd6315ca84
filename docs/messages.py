"""Write docs/messages.md: warnings and errors besides refusals, why they come and what to do.

python docs/messages.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_suffix(".md")
SOURCES = sorted([*ROOT.glob("focus_compile/**/*.py"), *ROOT.glob("passes/*.py")])
OPTION, BUG = "an option or argument is out of range", "a bug of ours: please report it"
OFF = "leave FOCUS off for this model"
TRACE, NAMED = "the file is no trace of `generate --trace`", "give one of the values that it names"
AGAIN = "make it again with `focus-compile generate --trace FILE`"

MESSAGES: dict[str, tuple[str, str]] = {
    # warnings
    "leaves this graph as it is": ("the graph was refused", "what it says"),
    "it does not know which tokens are masked": (
        "a call without a mask token and without masks", "what the warning says"),
    "attention is causal: no token sees": (
        "attention_mask is None or 2-D, or the model's own mask is causal",
        "focus_compile.block_mask"),
    "whose memory another input shares": (
        "a cache that is written into overlaps an input", "give each its own memory"),
    "that the model looks up in an argument are": (
        "more or fewer places than tokens, or others in each row; a negative number",
        "mark as many places as the block has tokens, or pass positions"),
    "writes keys and values into a part of a cache": (
        "a loop of one's own, with a cache whose tensors hold room for the block",
        "a cache that grows, or transformers' StaticCache"),
    "this is the last of %d graphs": (
        "calls with ever other kinds of arguments",
        "call alike, or raise Dynamo's recompile_limit"),
    "the layers of experts were replaced after": (
        "adapters were added to a model after it was compiled", "compile it anew"),
    "evict='auto': processes share": (
        "ranks would choose different programs, and wait for each other for ever",
        "what it says"),
    "is in no session, while one is open elsewhere": (
        "a thread, or code around a generator, calls outside of the session that was meant",
        "enter a session in that thread, around the call"),
    "a session ends without one masked call": (
        "the id of the mask token is another model's, or the loop never calls with masks",
        "give the model's own: tokenizer.mask_token_id"),
    "a session ends in which no call reached backend": (
        "the model's own generation method calls the model that was not compiled",
        "focus_compile.compile(model), or in_place=True"),
    "Dynamo has reached its recompile limit with this model": (
        "ever other kinds of arguments, or layouts of caches", "what it says"),
    "the model wrote into a mask whose values it tests": (
        "an adapter had read the mask before the model changed it", "adapt=False"),
    "the forward of this model was replaced after it was compiled": (
        "hooks of another library, or a patch, that came behind the compiler", "what it says"),
    "this model is compiled already": (
        "compile(in_place=True) of what compile returned, or twice",
        "compile the model itself, once"),
    "this model is not compiled in place": (
        "restore of a model that is as it was, or whose class somebody else changed since",
        "restore what compile(in_place=True) returned, once"),
    "a session ends in which masked calls may have run eagerly": (
        "Dynamo compiles only so many graphs of one function",
        "focus_compile.compile, session(alpha=...), or a larger recompile_limit"),
    "eviction misses more than its calibration has seen": (
        "an audit found fewer of dense's sure tokens kept than the calibration's prompts did",
        "calibrate with prompts like those of now; rescue bounds what is lost meanwhile"),
    "rescue, confidences and audits are off": (
        "a part of the model is compiled, and its logits are not seen",
        "compile the outermost module; or do without rescue"),
    # errors of a call
    "the calibration is of another model": (
        "the weights, or their dtype, are not those that were calibrated",
        "run `focus-compile calibrate` on this model"),
    "the calibration ranks by layers": (
        "a session cannot change the layers that programs are compiled for", "what it says"),
    "expected the file of focus-compile calibrate": (
        "the file, or the object, is something else", "run `focus-compile calibrate`"),
    "the signal is that of a calibration": (
        "`signal='auto'` without a calibration", "`calibration=...` beside it, or another signal"),
    "there are no prompts": ("an empty list of prompts", "give 32 or more"),
    "this program is not known to return logits": (
        "a part of the model is compiled, and its logits are not seen",
        "compile the outermost module, or take another signal"),
    "Dynamo ran the model eagerly": (
        "Dynamo compiles only so many graphs of one function",
        "focus_compile.compile, session(alpha=...), or a larger recompile_limit"),
    "two threads call a model in one session": (
        "a session is the scope of one generation", "enter one in each thread"),
    "a session is in mid-block, and in this call": (
        "gradients or autocast are enabled in this thread, and were not in the block's first calls",
        "torch.no_grad() in every thread"),
    "the model's embedding has": (
        "the id of another model's mask token", "give tokenizer.mask_token_id"),
    "no status: compile the model with": (
        "torch.compile keeps no record", "compile with focus_compile.compile"),
    "batch or block is empty": ("token ids without rows or tokens", "give at least one of each"),
    "slots of evicted tokens in the past": (
        "what a masked call returned was kept, and which call that was is not known "
        "([sessions.md](sessions.md#what-it-notices))",
        "commit each block by one call of its decoded tokens, and crop the cache after masked "
        "calls; run the call that fills a cache with session.enabled = False; where a prompt holds "
        "the mask token, its prefill is no masked call once session.masked is all zeros"),
    "which the last call evicted": (
        "a token was decoded that has no logits",
        "choose among session.retain_mask, or give tokens_per_step or session.require"),
    "was not compiled, and this call gave no result": (
        "Inductor, the C++ compiler or the disk failed",
        "mend what its cause names and call again"),
    "session.masked has dtype": ("masks that are no bools", "give bool [B, T]"),
    "session.masked has shape": ("masks of another shape than the ids", "give bool [B, T]"),
    "session.require has dtype": ("required tokens that are no bools", "give bool [B, T]"),
    "session.require has shape": ("required tokens of another shape", "give bool [B, T]"),
    "session.block=": ("a block outside of the call's tokens", "give (start, stop) within them"),
    "the signal's bias has shape": ("a bias of another shape than the ids", "give fp32 [B, T]"),
    "the model returns no value with a row": (
        "no output of the model has a row per token", "use logits='canvas'"),
    "the model sees their padding": (
        "a model without a cache whose attention ignores its mask, or that has none",
        "prompts of one length at a time"),
    # focus_compile.testing
    "nothing was tested": ("FOCUS was not applied", "see explain"),
    "is to be denoised": ("the ids of the call hold no mask token", "ids with masks"),
    "the model returns no logits [batch": ("no output is of that shape", "test the whole model"),
    " differ by ": ("FOCUS and eager differ", "report it, with explain(...).save(folder)"),
    ": FOCUS returns shapes": ("FOCUS and eager differ", "report it"),
    "leaves logits on the canvas, and session.logits is None": (
        "a part of the model is compiled, a module calls the compiled one, or its graph breaks",
        "compile the outermost module; or read the output at session.retain_mask"),
    "spread over all tokens of the block": (
        "the compiled program's output is not the model's logits",
        "compile the outermost module; tokens are right as they are"),
    "and each evicts tokens of its own": (
        "several compiled parts in one forward", "compile the outermost module"),
    "the model moves or mixes the logits": (
        "code behind the compiled program shifts logits or mixes those of tokens",
        "compile the outermost module, or generate(shifted_logits=True)"),
    "expected one row per token": (
        "the model returns logits of its last tokens only", "let it return those of all tokens"),
    "a sliding window of": (
        "prompt and answer are longer than a layer's sliding window",
        "shorter prompts or answers, or use_sliding_window=False"),
    "the model left the cache that it was given empty": (
        "generate, with a model that has no cache, or keeps it elsewhere",
        "generate(use_cache=False)"),
    # options and arguments
    "valid has shape": ("a mask that is not 2-D, or shorter than the block", "[B, S + T]"),
    "the options of backend 'focus' are": ("an unknown option", NAMED),
    "expected at least 1": (OPTION, "give a whole number from 1 on"),
    ": input_ids has": ("a mask of another shape than the ids", "give [batch, prompt]"),
    "expected prompts padded on the left": ("prompts padded on the right", "padding_side='left'"),
    "expected some candidates, and no others": (
        "a strategy of your own chose no token, or one that is not retained",
        "choose among the candidates"),
    "give denoising_steps or tokens_per_step": ("both were given", "give one"),
    "which must draw alike": (
        "temperature > 0 with a model that tp_plan shards", "give every process the same seed"),
    "give seed or generator, not both": ("both were given", "give one"),
    "no mask token: neither": ("nothing names the mask token", "give mask_token_id"),
    "input_ids holds": ("ids of another tokenizer", "use the tokenizer that comes with the model"),
    "an empty prompt": (
        "a prompt without tokens, and no beginning or end of text to start from", "give a text"),
    "stop_strings are looked for": ("tokens alone have no text", "give tokenizer, too"),
    "unknown model_args": ("an argument that nothing would read", NAMED),
    "names an end of text": ("the harness asks for an id that there is not", "set eos_token"),
    "give mask_token_id=...: the model is a function": ("a function has no config", "give it"),
    "nothing tells what one costs": ("a model of two layers", "ask a deeper one"),
    "pretrained is a model: give its tokenizer": ("`FocusLM(model)` alone", "give tokenizer, too"),
    "max_gen_toks=": ("answers longer than the model", "give a smaller max_gen_toks"),
    "lose their beginning": (
        "prompt and answer are longer than the model's positions",
        "take fewer shots, or a smaller max_gen_toks"),
    "FOCUS did not run": ("every step of a batch was dense", "see the warnings before it"),
    "a text has no likelihood": (
        "a task that compares likelihoods", "take tasks of output_type generate_until"),
    # command line
    "is not a model: it has no config.json": ("the folder holds no model", "give a model's folder"),
    "no such folder": (
        "PATH is no folder, no hub id and no module:function", "check its spelling"),
    "holds no prompts": (
        "the file of --prompts is empty or no text", "give UTF-8 text, one prompt a line"),
    'expected {"prompt": text}': (
        "a line of a .jsonl file is something else", 'write {"prompt": "text"} on it'),
    "needs --prompts FILE": ("`bench PATH` alone", "give --prompts FILE"),
    "--prompts needs a model": ("`bench --prompts` without PATH", "give PATH first"),
    ", not a torch.nn.Module": ("the function returned something else", "return a model"),
    "is a pointer of git-lfs": ("a clone without its large files", "run `git lfs pull`"),
    "is cut off or damaged": ("a download that broke off", "download the file again"),
    "that can be called without arguments": (
        "PATH names something else than a function, or one that needs arguments",
        "wrap it in a function without arguments"),
    "has no config": (
        "nothing tells the sizes of a call", "return the model and the arguments of a call"),
    "--prompt is empty": ("a prompt without text", "give a text"),
    "no tokenizer": ("PATH is a function", "give a folder, or token ids"),
    "is less than --retained": ("more is retained than fed", "swap them"),
    "is no ...: ...": (
        "`--trace` or `--calibration` is no JSON",
        "the file of `generate --trace`, or of `calibrate`"),
    "expected 0 <= retained <= fed <= 1": ("shares out of range", "give shares within it"),
    "no benchmarks here": ("an installed package", "run it in a checkout"),
    "FOCUS was not applied": ("the graph was refused", "see refusals.md"),
    # a trace that is malformed
    "is missing": (TRACE, AGAIN), "expected an object": (TRACE, AGAIN),
    "expected a whole number from 1 on": (TRACE, AGAIN), "expected a list": (TRACE, AGAIN),
    "expected an index": (TRACE, AGAIN), "booleans": (TRACE, AGAIN),
    "which is not masked": (TRACE, AGAIN),
    # ours
    "sizes became constants": (BUG, OFF),
    "after ...: ": (BUG, OFF),
    "a size became a constant": (BUG, OFF),
    "but computes": (BUG, OFF),
    "the graph holds no fake tensor": (BUG, OFF),
    " has the fields ": (BUG, OFF),
    "has a rule already": (
        "two axis rules for one operator", "take one of them out of axes/rules"),
    # any other option
    ": expected ": (OPTION, NAMED),
}  # fmt: skip
"""A part of the text -> why it comes, what to do. The first that a text holds is its own."""

HEAD = """# Messages: why they come, and what to do

Warnings and errors of the package; [refusals.md](refusals.md) has the reasons for which a graph is
left unchanged. Errors of transformers and PyTorch pass through as they are; the command line makes
one line of them. Written by `python -m docs.build`.

| Text | Kind | Why | What to do |
| --- | --- | --- | --- |
"""


def sites() -> list[tuple[str, str]]:
    """(kind, text) of every warning and error but refusals, ``...`` for what is filled in."""
    found: list[tuple[str, str]] = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for kind, call in _told(tree):
            for argument in call.args:
                value = constants.get(argument.id) if isinstance(argument, ast.Name) else argument
                if value is not None and len(_text(value).strip(". ")) > 8:
                    found.append((kind, _text(value)))
                    break
    return list(dict.fromkeys(found))


def _told(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    out: list[tuple[str, ast.Call]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = ast.unparse(node.exc.func)
            if kind not in ("Unsupported", "NothingToEvict"):
                out.append((kind, node.exc))
        elif isinstance(node, ast.ClassDef) and node.name not in ("Unsupported", "NothingToEvict"):
            out += [
                (node.name, call)
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("__init__")
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warning_once":
            out.append(("warning", node))
    return out


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    return "..."


def part(text: str) -> str | None:
    """The entry of a text."""
    return next((piece for piece in MESSAGES if piece in text), None)


def text() -> str:
    """The page."""
    lines = []
    for kind, told in sites():
        why, cure = MESSAGES[part(told) or told]
        lines.append(f"| {told.strip().replace('|', '/')} | {kind} | {why} | {cure} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(text())
