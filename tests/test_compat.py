"""What stands in the rows of both versions; what the installed one does is tested wherever models are loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmq import compat
from llmq.compat import VERSIONS

THETA = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


def text_config(**fields: Any) -> SimpleNamespace:
    """A config of transformers 4 with its defaults."""
    return SimpleNamespace(**{"model_type": "some", "rope_theta": 1.0, **fields})


@pytest.mark.parametrize(
    ("config", "parameters", "expected"),
    [
        ({}, THETA, {"rope_theta": 5e5}),
        ({"rope_scaling": {"rope_type": "yarn"}}, THETA, {"rope_theta": 5e5, "rope_scaling": None}),
        ({"rope_scaling": None}, LLAMA3, {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
        (
            {"rope_local_base_freq": 1.0},
            {"full_attention": THETA, "sliding_attention": LOCAL},
            {"rope_theta": 5e5, "rope_local_base_freq": 1e4},
        ),
        (
            {"partial_rotary_factor": 1.0, "rotary_pct": 1.0, "rotary_emb_base": 1},
            {**THETA, "partial_rotary_factor": 0.25},
            {"partial_rotary_factor": 0.25, "rotary_pct": 0.25, "rotary_emb_base": 5e5, "rope_theta": 5e5},
        ),
    ],
    ids=["theta", "no scaling", "llama3", "by layer", "of a part"],
)
def test_ropes_of_5_in_the_words_of_4(config: dict[str, Any], parameters: Any, expected: dict[str, Any]) -> None:
    text = text_config(**config)
    VERSIONS[4].set_rope_parameters(text, parameters)
    assert {name: getattr(text, name) for name in expected} == expected
    if "partial_rotary_factor" not in parameters:
        again = VERSIONS[4].rope_parameters(text)
        assert again == parameters


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, LLAMA3),
        ({}, {**THETA, "partial_rotary_factor": 0.5}),
        ({}, {"full_attention": THETA, "sliding_attention": LOCAL}),
        ({"rope_local_base_freq": 1.0, "rope_scaling": None}, {"full_attention": THETA, "sliding_attention": LLAMA3}),
        ({"rope_local_base_freq": 1.0}, {"full_attention": THETA, "chunked_attention": LOCAL}),
    ],
    ids=["scaling", "part", "by layer", "scaled by layer", "other layers"],
)
def test_ropes_without_fields_in_4_are_refused(config: dict[str, Any], parameters: Any) -> None:
    text = text_config(**config)
    before = vars(text).copy()
    with pytest.raises(ValueError, match=r"the some config of transformers 5 has rope_parameters .* has no fields"):
        VERSIONS[4].set_rope_parameters(text, parameters)
    assert vars(text) == before


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.transformers, "__version__", "6.1.0")
    with pytest.raises(ImportError, match=r"transformers 6.1.0 is installed; llmq works with 4 and 5"):
        compat._installed()
