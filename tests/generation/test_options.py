"""The types of generate's keywords, and what it returns by ``return_dict``."""

from __future__ import annotations

import inspect
from typing import Required, get_origin, get_overloads, get_type_hints

from torch import Tensor

from focus_compile import Generated, generate
from focus_compile.generation.options import Options


def test_options_are_the_keywords_of_generate() -> None:
    signature = inspect.signature(generate)
    keywords = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "return_dict"
    }
    assert list(Options.__annotations__) == list(keywords)
    needed = {name for name, found in keywords.items() if found.default is found.empty}
    marked = get_type_hints(Options, include_extras=True)
    assert needed == {name for name, hint in marked.items() if get_origin(hint) is Required}
    hints, types = get_type_hints(generate), get_type_hints(Options)
    assert {name: hints[name] for name in keywords} == types


def test_return_dict_tells_what_is_returned() -> None:
    hints = [get_type_hints(found) for found in get_overloads(inspect.unwrap(generate))]
    assert [hint["return"] for hint in hints] == [Generated, Tensor, Tensor | Generated]
