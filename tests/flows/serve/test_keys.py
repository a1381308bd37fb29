from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from flows.serve.errors import ApiError
from flows.serve.keys import Gatekeeper, Key, check_host, new_key, read_keys
from tasks.core.errors import BadParams

SHA = hashlib.sha256(b"secret").hexdigest()


def refused(gate: Gatekeeper, authorization: str | None, host: str | None = "127.0.0.1:8000") -> ApiError:
    with pytest.raises(ApiError) as caught:
        gate.admit(authorization, host)
    return caught.value


def test_a_new_key_opens_what_its_line_is_in(tmp_path: Path) -> None:
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(f"# clients\n\n{line}:5\n")
    (known,) = read_keys(tmp_path / "keys", {})
    assert known == Key("alice", hashlib.sha256(key.encode()).hexdigest(), 5)
    assert key not in line
    assert Gatekeeper([known]).admit(f"Bearer {key}", "example.org") == "alice"


def test_keys_also_come_from_the_environment() -> None:
    assert read_keys(None, {"TEMPER_KEYS": f"a:{SHA},b:{SHA}:7"}) == [Key("a", SHA), Key("b", SHA, 7)]
    assert read_keys(None, {}) == []


def test_a_line_may_end_with_a_role_on_the_pages() -> None:
    lines = f"a:{SHA}:viewer,b:{SHA}:7:approver,c:{SHA}:7"
    assert read_keys(None, {"TEMPER_KEYS": lines}) == [
        Key("a", SHA, None, "viewer"),
        Key("b", SHA, 7, "approver"),
        Key("c", SHA, 7, None),
    ]
    assert new_key("alice", "labeller")[1].endswith(":labeller")
    for wrong in (f"a:{SHA}:boss", f"a:{SHA}:viewer:7", f"a:{SHA}:"):
        with pytest.raises(BadParams, match="keys cannot be used"):
            read_keys(None, {"TEMPER_KEYS": wrong})
    with pytest.raises(BadParams, match="is no role"):
        new_key("alice", "boss")


def test_every_wrong_line_is_named_and_none_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"a:{SHA}\nsecret\nb:{SHA}:0\na:{SHA}\n")
    with pytest.raises(BadParams) as caught:
        read_keys(tmp_path / "keys", {})
    assert [example.rpartition("/")[2] for example in caught.value.examples] == [
        "keys:2: is no key",
        "keys:3: is no key",
        "keys:4: a has a key already",
    ]
    assert "secret" not in str(caught.value)


def test_an_empty_file_of_keys_does_not_open_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nobody yet\n")
    with pytest.raises(BadParams, match="holds no key"):
        read_keys(tmp_path / "keys", {})


@pytest.mark.parametrize("given", [None, "", "secret", "Basic secret", "Bearer", "Bearer Secret", "Bearer secret1"])
def test_without_its_key_nobody_is_let_in(given: str | None) -> None:
    error = refused(Gatekeeper([Key("a", SHA)]), given)
    assert (error.status, error.code) == (401, "invalid_api_key")


def test_a_key_has_its_rate_in_any_minute() -> None:
    now = 100.0
    gate = Gatekeeper([Key("a", SHA, 2), Key("b", hashlib.sha256(b"other").hexdigest())], lambda: now)
    assert [gate.admit("Bearer secret", None) for _ in range(2)] == ["a", "a"]
    error = refused(gate, "Bearer secret")
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert 0 < int(error.headers["Retry-After"]) <= 61
    assert gate.admit("Bearer other", None) == "b"
    now = 160.0
    assert gate.admit("Bearer secret", None) == "a"


def test_without_keys_only_this_machine_may_ask_under_its_own_name() -> None:
    gate = Gatekeeper([])
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "127.0.0.2:1", None):
        assert gate.admit(None, host) == ""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.1:8000"):
        assert refused(gate, None, host).status == 403


def test_other_machines_need_keys() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(BadParams, match="could use the models"):
            check_host(host, [])
        check_host(host, [Key("a", SHA)])
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, [])
