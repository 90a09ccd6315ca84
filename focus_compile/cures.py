"""What a user can do about a refusal: a table, by how the reason begins.

Kept apart from where refusals are raised: the reason names what is wrong with a graph, in the words
of the analysis; the cure says what to change in the model or in the call.
"""

from __future__ import annotations

__all__ = ["CURES", "cure_of"]

_WHOLE = (
    "compile the whole model, torch.compile(model, backend='focus'), and not a part of it; where "
    "Dynamo breaks the model into several graphs, remove the first graph break"
)
_ONE_BY_ONE = (
    "after the embedding, everything but attention must treat tokens one by one: take this "
    "operator out of the model's forward, or compute it from the ids before they are embedded"
)
_RULE = (
    "write it with operators that have a rule, or add its rule to focus_compile/rules.py "
    "(docs/design.md, 'Adding an operator')"
)
_CACHE = (
    "put new keys and values behind those of the cache with one torch.cat, or into its slots with "
    "one index_copy, and attend to the result alone: transformers' DynamicCache and StaticCache do"
)
_SHAPE = (
    "give attention queries, keys and values as [batch, heads, token, size], as "
    "torch.nn.functional.scaled_dot_product_attention takes them"
)
_MASKED = (
    "pass a mask [batch, 1, token, slots] that hides the slots that hold nothing, and leave "
    "is_causal off"
)
_SIZES = (
    "take sizes from the shapes of tensors (x.shape) instead of computing them from other numbers, "
    "and reshape with them"
)
_OUTPUTS = "return hidden states and logits as [batch, token, ...], and the cache as it was given"
_PACKED = (
    "give this operator values that are per token, or the same for all rows: expand one value per "
    "row over the tokens first"
)

_MASK = (
    "of attention_mask=None and of a 2-D mask, transformers makes a causal mask, and a diffusion "
    "LLM sees tokens on both sides: pass one of shape [B, 1, T, S + T], "
    "focus_compile.block_mask(model, valid, tokens)"
)

CURES: tuple[tuple[str, str], ...] = (
    ("no embedding of token ids", _WHOLE),
    ("no attention site over the tokens", _WHOLE),
    ("the graph has no tensor input", _WHOLE),
    ("FOCUS compares the attention of two layers", _WHOLE),
    ("two inputs are embedded", "pass the token ids alone; embed other inputs outside the model"),
    ("this operator mixes tokens outside attention", _ONE_BY_ONE),
    ("this operator changes the length of the token axis", _ONE_BY_ONE),
    ("the model makes its attention mask itself", _MASK),
    ("an operator removes the token axis", _ONE_BY_ONE),
    ("the token, batch or key axis meets another axis", _ONE_BY_ONE),
    ("fed tokens, in another order", _ONE_BY_ONE),
    ("packed tokens meet", _PACKED),
    ("a packed value has an axis of unknown size", _SIZES),
    ("no rule says how this operator treats the token axis", _RULE),
    (
        "what is computed from the last tokens alone",
        "slice the last tokens where the model returns them, hidden[:, -k:] before the head, and "
        "do nothing else with them but the head",
    ),
    (
        "the number of tokens per expert is used for something else",
        "use counts per expert as ends of grouped_mm only (docs/models.md): load the model with "
        "experts_implementation='grouped_mm' or 'batched_mm'",
    ),
    ("this operator fails on other sizes", _SIZES),
    ("an input folds two axes into one dimension", _SIZES),
    ("no input has the size", _SIZES),
    ("the meaning of the size", _SIZES),
    ("the size", _SIZES),
    ("a view changes the number of elements", _SIZES),
    ("a view splits an axis unevenly", _SIZES),
    ("expected a tensor", _SIZES),
    ("two attention sites run side by side", "attend one layer after the other: FOCUS orders them"),
    ("the queries of an attention site", _SHAPE),
    ("the batch axis of an attention site", _SHAPE),
    ("keys and values are not", _SHAPE),
    ("new keys and values are not", _SHAPE),
    ("keys or values of an attention site have no token axis", _SHAPE),
    (
        "neighbouring query heads do not share a key head",
        "let query head h read key head h // (H / G), as repeat_interleave and enable_gqa do",
    ),
    ("attention with dropout", "call model.eval()"),
    (
        "attention scores are used outside",
        "do not return attention weights: call the model with output_attentions=False",
    ),
    ("the mask of an attention site is scaled", "add the mask to the scores after they are scaled"),
    (
        "a mask of booleans or integers is added",
        "pass an additive mask, 0 where visible and torch.finfo(dtype).min elsewhere, or load the "
        "model with attn_implementation='sdpa', which takes a bool one",
    ),
    ("attention by flex_attention", "load the model with attn_implementation='sdpa' or 'eager'"),
    (
        "an operator holds a graph of its own",
        "take control flow (torch.cond, while_loop, checkpointing) out of the model's forward",
    ),
    ("the write of new keys or values into the cache", _CACHE),
    ("keys or values are mixed before they are attended to", _CACHE),
    ("this operator reads keys of the history", _CACHE),
    ("past keys or values are changed before they are used", _CACHE),
    ("keys and values are put into different slots", _CACHE),
    ("what this operator does with the slots of a cache", _CACHE),
    ("the slots of a cache are folded with another axis", _CACHE),
    (
        "the number of slots of a cache is written into the model",
        "read the number of slots from the cache's tensors, not from a number of the config",
    ),
    ("is_causal over the slots of a cache", _MASKED),
    ("attention over the slots of a cache needs a mask", _MASKED),
    ("the model returns a cache that it has changed", _OUTPUTS),
    ("the model returns last tokens of a value", _OUTPUTS),
    ("the model returns tokens in another order", _OUTPUTS),
    ("the graph returns a size", _OUTPUTS),
    (
        "the model writes what it computes of tokens",
        "return what is computed of tokens instead of writing it into an input; a cache's slots "
        "may be written",
    ),
    (
        "an operator writes into its input",
        "use the operator's form that returns its result (x = x + y, not x += y) where the input "
        "is a view or is shared",
    ),
    (
        "the model goes on behind a graph break",
        "remove the break at this line (torch._dynamo.explain tells more of it), so that one graph "
        "reaches from the token ids to the logits; or compile a module that ends before it, and "
        "whose output treats tokens one by one to the end: model.model = torch.compile(...)",
    ),
    ("a plan needs two attention sites", _WHOLE),
    ("attention sites are not in layer order", "attend one layer after the other"),
    ("attention of layer", "compute queries, keys and values from the tokens' hidden states alone"),
    ("the cut lies after", "compute the queries of layer 1 from what layer 0 returned alone"),
    (
        "weights are sharded over processes",
        "use transformers' tp_plan='auto', or load the whole model in every process and share the "
        "prompts out instead",
    ),
    (
        "the model calls collectives of its own",
        "shard it by transformers' tp_plan, whose DTensors tell what each process has, or load the "
        "whole model in every process and share the prompts out instead",
    ),
    (
        "an input is a ",
        "load the weights as plain tensors, or quantise inside of modules with operators that "
        "Dynamo captures as such",
    ),
    ("gradients are enabled", "call the model under torch.no_grad() or torch.inference_mode()"),
    ("autocast is enabled", "leave autocast, and give the model its dtype with model.to(dtype)"),
    (
        "internal error, please report it",
        "report it with the script that explain(...).save(folder) writes; the model runs unchanged",
    ),
)
"""(how a reason begins, what to do)."""


def cure_of(reason: str) -> str:
    """What to do about a refusal with this reason; empty where the table says nothing."""
    return next((cure for start, cure in CURES if reason.startswith(start)), "")
