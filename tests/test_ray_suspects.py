"""A node that loses work after work is left alone; a work that is lost everywhere is not its fault."""

from __future__ import annotations

from orchestrator.launch.ray_suspects import Suspects


def test_a_node_is_set_aside_after_three_works_in_a_row_while_others_do_theirs() -> None:
    suspects = Suspects()
    suspects.done("good", "a")
    assert [suspects.lost("bad", work) for work in "bcd"] == [False, False, True]
    assert suspects.avoided("e") == {"bad"}


def test_a_work_that_ends_there_in_between_clears_a_node() -> None:
    suspects = Suspects()
    suspects.done("good", "a")
    suspects.lost("bad", "b")
    suspects.lost("bad", "c")
    suspects.done("bad", "d")
    assert not suspects.lost("bad", "e") and not suspects.set_aside


def test_one_and_the_same_work_condemns_no_node() -> None:
    suspects = Suspects()
    suspects.done("good", "a")
    assert not any(suspects.lost("bad", "poisoned") for _ in range(5))


def test_losses_elsewhere_speak_for_a_node_and_the_last_one_is_kept() -> None:
    suspects = Suspects()
    assert not any(suspects.lost("only", work) for work in "abcd")  # nobody does better
    suspects.done("good", "e")
    suspects.lost("good", "f")
    assert not suspects.lost("only", "g")
    suspects.done("good", "h")
    assert suspects.lost("only", "i")


def test_a_lost_work_goes_elsewhere_until_it_is_done() -> None:
    suspects = Suspects()
    suspects.lost("one", "a")
    assert suspects.avoided("a") == {"one"} and suspects.avoided("b") == set()
    suspects.done("two", "a")
    assert suspects.avoided("a") == set()


def test_a_lost_work_goes_to_the_same_node_once_more_while_others_are_full() -> None:
    suspects = Suspects()
    suspects.lost("one", "a")
    assert suspects.avoided("a", others_are_full=True) == set()
    suspects.lost("one", "a")
    assert suspects.avoided("a", others_are_full=True) == {"one"}
