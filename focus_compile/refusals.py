"""Why graphs are refused: a catalogue of values, each with its reason and its cure.

The reason names what is wrong with a graph, in the words of the analysis; the cure says what to
change in the model or in the call. ``raise Unsupported(NO_SIZE, node, extent=extent)`` gives a
value for every ``{field}`` of the reason. This is the lowest floor: it imports nothing of the
package, and has no ``__all__``, for every public name is one to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Refusal:
    """A reason, ``{field}`` where a value is filled in, and what a user can do about it."""

    reason: str
    cure: str

    @property
    def fields(self) -> frozenset[str]:
        """What the reason leaves open."""
        parsed = Formatter().parse(self.reason)
        return frozenset(name for _, name, _, _ in parsed if name is not None)

    def filled(self, values: dict[str, object]) -> str:
        """The reason with a value for every field.

        Raises:
            TypeError: a field is missing, or there is none of that name.
        """
        if values.keys() != self.fields:
            raise TypeError(
                f"{self.reason!r} has the fields {sorted(self.fields)}, got {sorted(values)}"
            )
        return self.reason.format(**values)


def catalogue() -> dict[str, Refusal]:
    """Every entry by its name."""
    return {name: value for name, value in globals().items() if isinstance(value, Refusal)}


# -- the graph as a whole --------------------------------------------------------------------------

_WHOLE = (
    "compile the whole model, torch.compile(model, backend='focus'), and not a part of it; where "
    "Dynamo breaks the model into several graphs, remove the first graph break"
)
NO_EMBEDDING = Refusal(
    "no embedding of token ids: compile the whole model, not single layers", _WHOLE
)
BEHIND_A_BREAK = Refusal("no embedding of token ids behind a graph break: {place}", _WHOLE)
DYNAMIC_ROPE = Refusal(
    "dynamic RoPE breaks the graph before the layers: {place}",
    "set rope_type='default' in the config's rope_parameters where texts are no longer than "
    "the model was trained for, or 'yarn', whose table is fixed: 'dynamic' and 'longrope' read "
    "the length of the text in the model's forward",
)
NO_ATTENTION = Refusal("no attention site over the tokens: compile the whole model", _WHOLE)
NO_TENSOR_INPUT = Refusal("the graph has no tensor input", _WHOLE)
ONE_LAYER = Refusal("FOCUS compares the attention of two layers, and this graph has one", _WHOLE)
TWO_EMBEDDINGS = Refusal(
    "two inputs are embedded: which one holds the token ids?",
    "pass the token ids alone; embed other inputs outside the model",
)
GOES_ON_BEHIND_A_BREAK = Refusal(
    "the model goes on behind a graph break with what it computed of tokens, where evicted ones "
    "would be rows of zeros: {broke}",
    "remove the break at this line (torch._dynamo.explain tells more of it), so that one graph "
    "reaches from the token ids to the logits; or compile a module that ends before it, and "
    "whose output treats tokens one by one to the end: model.model = torch.compile(...)",
)
OPERATOR_WITH_A_GRAPH = Refusal(
    "an operator holds a graph of its own, into which the passes do not look",
    "take control flow (torch.cond, while_loop, checkpointing) out of the model's forward",
)
TENSOR_OF_TENSORS = Refusal(
    "an input is a {kind}, a tensor made of others, and no weight of one process",
    "tensors made of others may be weights and buffers, as quantised ones are, in one process: "
    "call the model with plain tensors, and share prompts out in place of quantised weights",
)
RETURNS_TENSOR_OF_TENSORS = Refusal(
    "the model returns a tensor made of others",
    "return plain tensors: no token of another one can be evicted",
)
WRITES_INPUT = Refusal(
    "an operator writes into its input",
    "use the operator's form that returns its result (x = x + y, not x += y) where the input "
    "is a view or is shared; write keys and values of all rows and heads at once, "
    "cache[:, :, start:end] = k, cache[:, :, index] = k or, where rows have slots of their own, "
    "cache[torch.arange(batch)[:, None], :, index] = k.transpose(1, 2)",
)
ONE_TOKEN = Refusal(
    "the block has one token",
    "give blocks of several tokens: of a single one nothing can be evicted, and the dense program "
    "is all there is to run",
)
GRADIENTS = Refusal(
    "gradients are enabled: call the model under torch.no_grad()",
    "call the model under torch.no_grad() or torch.inference_mode()",
)
AUTOCAST = Refusal(
    "autocast is enabled: give the model its dtype with model.to(...) instead",
    "leave autocast, and give the model its dtype with model.to(dtype)",
)
INTERNAL_ERROR = Refusal(
    "internal error, please report it: {kind}: {error}",
    "report it with the script that explain(...).save(folder) writes; the model runs unchanged",
)

_LOOKED_UP = (
    "look positions and numbers up in an argument that the model does not write into, as "
    "replace_position.nonzero(as_tuple=True)[1] does, or outside the model, and pass them"
)
LOOKED_UP_IN_TOKENS = Refusal(
    "a number or positions are looked up in what was computed of tokens", _LOOKED_UP
)
LOOKED_UP_IN_WRITTEN = Refusal(
    "positions are looked up in a tensor that the model writes into", _LOOKED_UP
)
LOOKED_UP_SLICE = Refusal(
    "what a slice between numbers that are looked up holds is not known",
    "slice each dim by numbers whose difference is the number of tokens, table[:, end - t : end], "
    "or pass positions, int64 [T], and index by them",
)

# -- operators over tokens -------------------------------------------------------------------------

_ONE_BY_ONE = (
    "after the embedding, everything but attention must treat tokens one by one: take this "
    "operator out of the model's forward, or compute it from the ids before they are embedded"
)
MIXES_TOKENS = Refusal("this operator mixes tokens outside attention", _ONE_BY_ONE)
CHANGES_LENGTH = Refusal("this operator changes the length of the token axis", _ONE_BY_ONE)
REMOVES_TOKENS = Refusal("an operator removes the token axis", _ONE_BY_ONE)
AXES_MEET = Refusal("the token, batch or key axis meets another axis", _ONE_BY_ONE)
ANOTHER_ORDER = Refusal("fed tokens, in another order, meet retained ones", _ONE_BY_ONE)
NO_RULE = Refusal(
    "no rule says how this operator treats the token axis",
    "write it with operators that have a rule, or add its rule to focus_compile/axes/rules "
    "(CONTRIBUTING.md)",
)
_PACKED = (
    "give this operator values that are per token, or the same for all rows: expand one value per "
    "row over the tokens first"
)
FOLDED_TOKENS = Refusal("packed tokens meet a value whose token axis is folded", _PACKED)
VALUE_PER_ROW = Refusal("packed tokens meet one value per row in this operator", _PACKED)
LAST_TOKENS = Refusal(
    "what is computed from the last tokens alone is not understood",
    "slice the last tokens where the model returns them, hidden[:, -k:] before the head, and "
    "do nothing else with them but the head",
)
EXPERT_COUNTS = Refusal(
    "the number of tokens per expert is used for something else",
    "use counts per expert as ends of grouped_mm only (docs/models.md): load the model with "
    "experts_implementation='grouped_mm' or 'batched_mm'",
)

# -- sizes -----------------------------------------------------------------------------------------

_SIZES = (
    "take sizes from the shapes of tensors (x.shape) instead of computing them from other numbers, "
    "and reshape with them"
)
UNKNOWN_SIZE = Refusal("a packed value has an axis of unknown size", _SIZES)
OTHER_SIZES = Refusal("this operator fails on other sizes: {error}", _SIZES)
FOLDED_INPUT = Refusal("an input folds two axes into one dimension", _SIZES)
NO_SIZE = Refusal("no input has the size {extent}", _SIZES)
SIZE_MEANING = Refusal("the meaning of the size {size} is unknown", _SIZES)
SIZE_FORM = Refusal("the size {size} is neither a sum nor a product", _SIZES)
VIEW_OF_OTHER_SIZE = Refusal("a view changes the number of elements", _SIZES)
UNEVEN_VIEW = Refusal("a view splits an axis unevenly", _SIZES)
NO_TENSOR = Refusal("expected a tensor", _SIZES)

# -- attention sites -------------------------------------------------------------------------------

SITES_ABREAST = Refusal(
    "two attention sites run side by side", "attend one layer after the other: FOCUS orders them"
)
_SHAPE = (
    "give attention queries, keys and values as [batch, heads, token, size], as "
    "torch.nn.functional.scaled_dot_product_attention takes them"
)
QUERY_AXES = Refusal("the queries of an attention site are not [batch, heads, token, size]", _SHAPE)
BATCH_AXIS = Refusal("the batch axis of an attention site is not its first", _SHAPE)
KEY_AXES = Refusal("keys and values are not [batch, heads, token, size]", _SHAPE)
NEW_KEY_AXES = Refusal("new keys and values are not [batch, ..., token, ...]", _SHAPE)
KEYS_WITHOUT_TOKENS = Refusal("keys or values of an attention site have no token axis", _SHAPE)
HEAD_GROUPS = Refusal(
    "neighbouring query heads do not share a key head",
    "let query head h read key head h // (H / G), as repeat_interleave and enable_gqa do",
)
DROPOUT = Refusal("attention with dropout: call model.eval() first", "call model.eval()")
SCORES_USED = Refusal(
    "attention scores are used outside their attention site",
    "do not return attention weights: call the model with output_attentions=False",
)
MASK_SCALED = Refusal(
    "the mask of an attention site is scaled", "add the mask to the scores after they are scaled"
)
MASK_NOT_ADDITIVE = Refusal(
    "a mask of booleans or integers is added to attention scores, where True adds 1: give eager "
    "attention an additive mask, 0 where visible and else the lowest number",
    "pass an additive mask, 0 where visible and torch.finfo(dtype).min elsewhere, or load the "
    "model with attn_implementation='sdpa', which takes a bool one",
)
MAKES_MASK = Refusal(
    "the model makes its attention mask itself",
    "of attention_mask=None and of a 2-D mask, transformers makes a causal mask, and a diffusion "
    "LLM sees tokens on both sides: pass one of shape [B, 1, T, S + T], "
    "focus_compile.block_mask(model, valid, tokens)",
)
FLEX_ATTENTION = Refusal(
    "attention by flex_attention, whose masks are functions: load the model with "
    "attn_implementation='sdpa' or 'eager'",
    "load the model with attn_implementation='sdpa' or 'eager'",
)
FEW_SITES = Refusal("a plan that scores layer {layer} needs its attention site", _WHOLE)
SITE_ORDER = Refusal("attention sites are not in layer order", "attend one layer after the other")
SITE_NOT_PACKED = Refusal(
    "attention of layer {layer} reads {name}, not packed",
    "compute queries, keys and values from the tokens' hidden states alone",
)
LATE_QUERIES = Refusal(
    "the cut lies after the queries of layer {layer}",
    "compute the queries of a layer from what the layer before it returned alone",
)

# -- the cache -------------------------------------------------------------------------------------

_CACHE = (
    "put new keys and values behind those of the cache with one torch.cat, or into its slots with "
    "one index_copy, and attend to the result alone: transformers' DynamicCache and StaticCache do"
)
CACHE_WRITE = Refusal("the write of new keys or values into the cache is not understood", _CACHE)
KEYS_MIXED = Refusal("keys or values are mixed before they are attended to", _CACHE)
READS_HISTORY = Refusal("this operator reads keys of the history", _CACHE)
CACHE_CUT = Refusal(
    "the model cuts off a part of a cache, and attends to it",
    "attend to all slots of the cache, under a mask [batch, 1, token, slots] that hides those that "
    "hold nothing; or cut it before the call, and give the model what it attends to",
)
PAST_CHANGED = Refusal("past keys or values are changed before they are used", _CACHE)
DIFFERENT_SLOTS = Refusal("keys and values are put into different slots", _CACHE)
UNKNOWN_ON_SLOTS = Refusal("what this operator does with the slots of a cache is unknown", _CACHE)
FOLDED_SLOTS = Refusal("the slots of a cache are folded with another axis", _CACHE)
FIXED_SLOTS = Refusal(
    "the number of slots of a cache is written into the model",
    "read the number of slots from the cache's tensors, not from a number of the config",
)
_MASKED = (
    "pass a mask [batch, 1, token, slots] that hides the slots that hold nothing, and leave "
    "is_causal off"
)
CAUSAL_SLOTS = Refusal("is_causal over the slots of a cache: give a mask", _MASKED)
SLOTS_WITHOUT_MASK = Refusal("attention over the slots of a cache needs a mask", _MASKED)

# -- what the model returns ------------------------------------------------------------------------

_OUTPUTS = "return hidden states and logits as [batch, token, ...], and the cache as it was given"
RETURNS_CACHE = Refusal("the model returns a cache that it has changed", _OUTPUTS)
RETURNS_LAST = Refusal("the model returns last tokens of a value that is not packed", _OUTPUTS)
RETURNS_ANOTHER_ORDER = Refusal("the model returns tokens in another order, or folded", _OUTPUTS)
RETURNS_SIZE = Refusal("the graph returns a size", _OUTPUTS)
WRITES_TOKENS = Refusal(
    "the model writes what it computes of tokens into an input",
    "return what is computed of tokens instead of writing it into an input; a cache's slots "
    "may be written",
)

# -- several processes -----------------------------------------------------------------------------

UNKNOWN_SHARDS = Refusal(
    "weights are sharded over processes in a way that is not known here",
    "use transformers' tp_plan='auto' with PyTorch 2.13 or later, or load the whole model in every "
    "process and share the prompts out instead",
)
OWN_COLLECTIVES = Refusal(
    "the model calls collectives of its own",
    "shard it by transformers' tp_plan, whose DTensors tell what each process has, or load the "
    "whole model in every process and share the prompts out instead",
)
