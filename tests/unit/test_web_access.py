"""The web page's token, sessions and limit on wrong tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from oncofed.deploy.operate import access
from oncofed.deploy.operate.access import PAUSE_S, SESSION_S, SESSIONS, TOKEN, TRIES, Access, token_of


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_token_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    assert len(token) >= 43
    assert token_of(tmp_path) == token
    assert (tmp_path / TOKEN).stat().st_mode & 0o777 == 0o600
    assert token_of_another(tmp_path) != token


def token_of_another(tmp_path: Path) -> str:
    return token_of(tmp_path / "another")


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token_of(tmp_path)
    (tmp_path / TOKEN).chmod(0o640)
    with pytest.raises(ValueError, match=r"mode 640.*remove it"):
        token_of(tmp_path)


@pytest.mark.parametrize("content", ["", "short", "spaces within a token are no token at all, are they"])
def test_what_is_no_token_is_refused(tmp_path: Path, content: str) -> None:
    token_of(tmp_path)
    (tmp_path / TOKEN).write_text(content)
    with pytest.raises(ValueError, match="is no token"):
        token_of(tmp_path)


def test_only_the_token_is_right() -> None:
    guard = Access("a" * 43)
    assert guard.right("a" * 43)
    for wrong in ("", "a" * 42, "a" * 44, "b" * 43, "ä" * 43, "\udc80"):
        assert not guard.right(wrong)


def test_wrong_tokens_pause_an_address_and_no_other() -> None:
    clock = Clock()
    guard = Access("right", clock)
    for _ in range(TRIES):
        assert guard.pause("a") == 0.0
        assert not guard.try_token("a", "wrong")
    assert guard.pause("a") == PAUSE_S
    assert guard.pause("b") == 0.0
    clock.now += PAUSE_S - 1
    assert guard.pause("a") == 1.0
    clock.now += 1
    assert guard.pause("a") == 0.0
    assert not guard.try_token("a", "wrong")
    assert guard.pause("a") == 0.0, "the count has begun again"


def test_the_right_token_forgets_the_wrong_ones() -> None:
    guard = Access("right", Clock())
    for _ in range(3):
        for _ in range(TRIES - 1):
            guard.try_token("a", "wrong")
        assert guard.try_token("a", "right")
    assert guard.pause("a") == 0.0


def test_addresses_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "ADDRESSES", 3)
    guard = Access("right", Clock())
    for address in "abcdef":
        guard.try_token(address, "wrong")
    assert list(guard._wrong) == ["d", "e", "f"]


def test_sessions_end() -> None:
    clock = Clock()
    guard = Access("right", clock)
    first, second = guard.open(), guard.open()
    assert first != second
    assert guard.session(first)
    guard.close(first)
    assert not guard.session(first)
    assert guard.session(second)
    assert not guard.session("")
    clock.now += SESSION_S
    assert not guard.session(second)


def test_sessions_are_bounded() -> None:
    guard = Access("right", Clock())
    first = guard.open()
    others = [guard.open() for _ in range(SESSIONS)]
    assert not guard.session(first)
    assert all(guard.session(s) for s in others)
