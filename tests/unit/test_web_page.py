"""The web page of a run: who may read it, what browsers are told, and that words of sites stay words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from oncofed.deploy.operate.access import TRIES
from oncofed.deploy.operate.state import Follower, RunState
from oncofed.deploy.operate.web import application, checked
from starlette.testclient import TestClient
from toy_journal import write_journal

TOKEN = "t" * 43
EVIL = "<script>alert(1)</script>"


def client_of(out: Path, base: str = "http://127.0.0.1:8600", address: str = "10.0.0.1") -> TestClient:
    app = application(out, TOKEN, Follower(out).state)
    return TestClient(app, base_url=base, follow_redirects=False, client=(address, 5000))


def logged_in(out: Path, base: str = "http://127.0.0.1:8600") -> TestClient:
    client = client_of(out, base)
    assert client.post("/login", data={"token": TOKEN}).status_code == 303
    return client


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_journal(tmp_path / "out")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "status"), [("/", 303), ("/report", 303), ("/api/state", 401), ("/metrics", 401)])
def test_nothing_without_the_token(out: Path, method: str, path: str, status: int) -> None:
    (out / "report.html").write_text("the report")
    response = client_of(out).request(method, path)
    assert response.status_code == status
    assert "pan-cancer-1" not in response.text
    assert "North" not in response.text
    if status == 303:
        assert response.headers["location"] == "/login"
    else:
        assert response.headers["www-authenticate"] == "Bearer"


def test_a_token_in_the_url_is_no_token(out: Path) -> None:
    client = client_of(out)
    assert client.get(f"/?token={TOKEN}").status_code == 303
    assert client.get(f"/api/state?token={TOKEN}").status_code == 401
    assert client.post(f"/login?token={TOKEN}", data={"a": "b"}).status_code == 403


def test_the_token_opens_the_page_and_logging_out_closes_it(out: Path) -> None:
    client = client_of(out)
    response = client.post("/login", data={"token": f" {TOKEN}\n"})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"].lower()
    for word in ("httponly", "samesite=strict", "path=/", "max-age=43200"):
        assert word in cookie
    assert "secure" not in cookie
    assert TOKEN not in cookie
    page = client.get("/")
    assert page.status_code == 200
    for shown in ("pan-cancer-1", "Gulf Coast", "7 of 10", "fold 1, training, 2 rounds done", "no answer within 60 s"):
        assert shown in page.text
    assert TOKEN not in page.text
    held = dict(client.cookies)
    assert client.get("/login").headers["location"] == "/"
    assert client.post("/logout").headers["location"] == "/login"
    assert client.get("/").status_code == 303
    assert client_of(out).get("/", cookies=held).status_code == 303, "the session itself has ended"


def test_over_tls_the_cookie_never_leaves_it(out: Path) -> None:
    client = client_of(out, "https://127.0.0.1")
    cookie = client.post("/login", data={"token": TOKEN}).headers["set-cookie"]
    assert cookie.startswith("__Host-")
    assert "secure" in cookie.lower()
    assert client.get("/").status_code == 200


def test_a_session_is_of_one_run(out: Path, tmp_path: Path) -> None:
    other = write_journal(tmp_path / "other")
    mine, others = logged_in(out), logged_in(other)
    assert set(mine.cookies) != set(others.cookies), "pages on other ports share a browser's cookies"


def test_wrong_tokens_are_limited(out: Path) -> None:
    client = client_of(out)
    for _ in range(TRIES):
        response = client.post("/login", data={"token": "wrong"})
        assert response.status_code == 403
        assert "This is not the token" in response.text
    response = client.post("/login", data={"token": TOKEN})
    assert response.status_code == 429
    assert 0 < int(response.headers["retry-after"]) <= 300
    assert client.get("/").status_code == 303


def test_wrong_tokens_of_programs_are_limited_and_leave_people_alone(out: Path) -> None:
    client = client_of(out)
    for _ in range(TRIES):
        assert client.get("/metrics", headers={"authorization": "Bearer wrong"}).status_code == 401
    response = client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"})
    assert (response.status_code, "retry-after" in response.headers) == (429, True)
    assert client.post("/login", data={"token": TOKEN}).status_code == 303


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"x" * 5000, "application/x-www-form-urlencoded"),
        (b"token=" + TOKEN.encode(), "text/plain"),
        (b"token=\xff\xfe", "application/x-www-form-urlencoded"),
        (b"a=1&b=2&c=3&d=4&e=5&f=6", "application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_login_form_is_refused(out: Path, content: bytes, kind: str) -> None:
    response = client_of(out).post("/login", content=content, headers={"content-type": kind})
    assert response.status_code in (400, 403)
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_forms_of_other_pages_are_refused(out: Path, headers: dict[str, str]) -> None:
    client = logged_in(out)
    assert client.post("/logout", headers=headers).status_code == 403
    assert client.post("/login", data={"token": TOKEN}, headers=headers).status_code == 403
    assert client.get("/").status_code == 200
    assert client.post("/logout", headers={"origin": "http://127.0.0.1:8600"}).status_code == 303


@pytest.mark.parametrize("path", ["/", "/api/state", "/metrics", "/report", "/static/page.js"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_everything_else_is_for_reading_only(out: Path, path: str, method: str) -> None:
    assert logged_in(out).request(method, path).status_code == 405


def test_head_says_what_get_says(out: Path) -> None:
    client = logged_in(out)
    for path in ("/", "/api/state", "/metrics", "/static/page.css"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", ["/", "/login", "/api/state", "/metrics", "/static/page.js", "/nowhere", "/logout"])
@pytest.mark.parametrize("known", [True, False])
def test_every_answer_tells_browsers_to_do_no_more_than_show_it(out: Path, path: str, known: bool) -> None:
    client = logged_in(out) if known else client_of(out)
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"


def test_an_error_of_ours_has_the_headers_too(out: Path) -> None:
    def broken() -> None:
        raise RuntimeError("secret detail")

    app = application(out, TOKEN, broken)  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    response = client.get("/api/state", headers={"authorization": f"Bearer {TOKEN}"})
    assert response.status_code == 500
    assert "secret detail" not in response.text
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "127.0.0.1@evil.example"])
def test_foreign_names_are_refused(out: Path, host: str) -> None:
    response = logged_in(out).get("/", headers={"host": host})
    assert response.status_code == 421
    assert "pan-cancer-1" not in response.text


@pytest.mark.parametrize("host", ["localhost:8600", "[::1]:8600", "127.0.0.1", "LOCALHOST"])
def test_names_of_this_machine_are_known(out: Path, host: str) -> None:
    assert client_of(out).get("/login", headers={"host": host}).status_code == 200


def test_words_of_sites_stay_words(tmp_path: Path) -> None:
    out = write_journal(
        tmp_path / "out",
        study=f"study {EVIL}",
        sites=(f"site {EVIL}", 'quote" onmouseover="alert(1)'),
        left_out=((f"site {EVIL}", f"reason {EVIL}<img src=x onerror=alert(1)>"),),
        end=f"failed {EVIL}",
    )
    client = logged_in(out)
    page, told = client.get("/").text, client.get("/api/state").json()
    assert told["state"]["sites"][1]["name"] == f"site {EVIL}", "JSON tells them as they are"
    for text in (page, *told["parts"].values()):
        assert EVIL not in text
        assert "<img" not in text
        assert 'quote" on' not in text
    assert "site &lt;script&gt;" in page
    assert "reason &lt;script&gt;" in told["parts"]["sites"]
    assert "failed &lt;script&gt;" in told["parts"]["headline"]


def test_the_page_has_nothing_that_its_policy_forbids(out: Path) -> None:
    client = logged_in(out)
    for text in (
        client.get("/").text,
        client_of(out).get("/login").text,
        *client.get("/api/state").json()["parts"].values(),
    ):
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", text)
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))


def test_curves_stand_for_what_the_journal_says(out: Path, tmp_path: Path) -> None:
    page = logged_in(out).get("/").text
    assert "Loss of fold 1: 0.7 at round 1, 0.5 at round 2; 1 other folds" in page
    assert "Validation of fold 1: 0.61 at round 1, 0.62 at round 2; 1 other folds" in page
    hidden = logged_in(write_journal(tmp_path / "hidden", loss=False)).get("/").text
    assert "<svg" not in hidden
    assert "stays hidden under masks and privacy" in hidden


def test_the_api_follows_the_run(out: Path) -> None:
    client = logged_in(out)
    assert client.get("/api/state").json()["state"]["rounds_done"] == 7
    (out / "journal.jsonl").unlink()
    write_journal(out, done=9)
    assert client.get("/api/state").json()["state"]["rounds_done"] == 9


def test_a_folder_whose_run_is_gone_is_said(out: Path) -> None:
    client = logged_in(out)
    (out / "journal.jsonl").unlink()
    for path in ("/", "/api/state", "/metrics"):
        response = client.get(path)
        assert response.status_code == 503
        assert "no run was started here" in response.text


def test_the_report_of_a_finished_run(tmp_path: Path) -> None:
    out = write_journal(tmp_path / "out", end="finished")
    client = logged_in(out)
    assert client.get("/report").status_code == 404
    assert "oncofed study report" in client.get("/").text
    (out / "report.html").write_text("<style>p{}</style>the report")
    response = client.get("/report")
    assert response.text.endswith("the report")
    policy = response.headers["content-security-policy"]
    assert "style-src 'unsafe-inline'" in policy
    assert policy.endswith("sandbox")
    assert "script-src" not in policy
    assert response.headers["cache-control"] == "no-store"
    assert 'href="/report"' in client.get("/").text
    os.utime(out / "report.html", (0, 0))
    assert client.get("/report").status_code == 404, "of an earlier run"


def test_the_report_of_a_run_that_goes_on_is_an_earlier_ones(out: Path) -> None:
    (out / "report.html").write_text("the report")
    assert logged_in(out).get("/report").status_code == 404


def test_other_files_of_the_folder_stay_there(out: Path) -> None:
    client = logged_in(out)
    for path in (
        "/journal.jsonl",
        "/static/../journal.jsonl",
        "/static/%2e%2e/run.html",
        "/static/..%2frun.html",
        "/web.token",
    ):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("host", "names", "wanted"),
    [
        ("0.0.0.0", ("study.example",), "in the clear"),
        ("192.0.2.7", (), "in the clear"),
        ("study.example", (), "in the clear"),
    ],
)
def test_the_token_never_crosses_a_network_in_the_clear(
    out: Path, host: str, names: tuple[str, ...], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        checked(out, host, names, None)
    for home in ("127.0.0.1", "localhost", "::1"):
        checked(out, home, (), None)


def test_listening_everywhere_wants_names_and_files(out: Path, tmp_path: Path) -> None:
    tls = (tmp_path / "a.crt", tmp_path / "a.key")
    with pytest.raises(ValueError, match="--name"):
        checked(out, "0.0.0.0", (), tls)
    with pytest.raises(ValueError, match=r"a\.crt: no such file"):
        checked(out, "0.0.0.0", ("study.example",), tls)
    for file in tls:
        file.touch()
    checked(out, "0.0.0.0", ("study.example",), tls)


def test_a_folder_without_a_run_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run was started here"):
        checked(tmp_path, "127.0.0.1", (), None)


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    client = TestClient(application(tmp_path, TOKEN, RunState), base_url="http://localhost")
    page = client.post("/login", data={"token": TOKEN}).text
    for shown in ("waiting", "the sites are greeted", "not known yet", "none yet"):
        assert shown in page
