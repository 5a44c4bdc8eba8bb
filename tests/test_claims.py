"""Of gangs that want the same result one has it at a time, in the order in which they asked."""

from __future__ import annotations

from orchestrator.launch.claims import Claims


def test_claims_pass_on_in_turn_and_past_who_is_gone():
    claims: Claims[str] = Claims()
    assert claims.want("x", "a") == [("x", "a")]
    assert claims.want("x", "b") == claims.want("x", "c") == []
    assert claims.want("y", "b") == [("y", "b")]
    assert claims.let_go("x", "c") == []  # which had only waited
    assert claims.want("x", "c") == []
    assert claims.forget("a") == [("x", "b")]
    assert claims.forget("b") == [("x", "c")]
    assert claims.want("y", "c") == [("y", "c")]
    assert claims.let_go("x", "c") == [] and claims.let_go("z", "c") == []
    assert claims.want("x", "a") == [("x", "a")]
