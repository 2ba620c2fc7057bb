"""Untrusted text in messages: no secret, no control character, one line."""

import pytest

from calibprune.redact import holds_credential, one_line, plain, plain_lines, without_secrets

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD", "X_API_KEY"]
)
def test_values_of_secret_variables_are_hidden(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    for form in (SECRET, "wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCY"):
        assert plain(f"bad key {form}!") == "bad key ***!"


def test_what_is_no_secret_stays(monkeypatch, tmp_path):
    token = tmp_path / "a-token-file"
    token.write_text("x")
    monkeypatch.setenv("HF_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    text = f"{token}: generate.max_tokens=20000000 of hf://datasets/org/name@main/a, s3://bucket/run?b=1, token mode"
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach https://me:pa55@host:9/x", "cannot reach https://***@host:9/x"),
        ("GET 'https://h/k?X-Amz-Credential=AK%2Fx&X-Amz-Signature=abc123&b=1'", "GET 'https://h/k?X-Amz-Credential=***&X-Amz-Signature=***&b=1'"),
        ("https://h/k?sv=2&sig=abc)", "https://h/k?sv=2&sig=***)"),
        ("Authorization: Bearer abcdefghijklmnopqrst", "Authorization: Bearer ***"),
        ("id AKIAIOSFODNN7EXAMPLE.", "id ***."),
        ("hf_abcdefghijklmnopqrstuvwxyz is wrong", "*** is wrong"),
        ("aws_secret_access_key=5EC2E7/+ab in the profile", "aws_secret_access_key=*** in the profile"),
        ('{"session_token": "5EC2E7", "region": "here"}', '{"session_token": "***", "region": "here"}'),
        ("2 tokens: 512 tokens/s, token: 3", "2 tokens: 512 tokens/s, token: 3"),
        ("HF_TOKEN=abcdefgh12345678 x", "HF_TOKEN=*** x"),
        ("DefaultEndpoints;AccountKey=abc/def==;x", "DefaultEndpoints;AccountKey=***;x"),
        ("-----BEGIN PRIVATE KEY----- MIIabc -----END PRIVATE KEY----- y", "-----BEGIN PRIVATE KEY-----*** y"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("the basic responsibilities of", "the basic responsibilities of"),
    ],
)  # fmt: skip
def test_addresses_and_known_tokens(text, shown):
    assert plain(text) == shown


def test_a_tokenizer_is_no_secret(monkeypatch):
    monkeypatch.setenv("TOKENIZER_NAME", "meta-llama/Meta-Llama-3-8B")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert plain("model meta-llama/Meta-Llama-3-8B") == "model meta-llama/Meta-Llama-3-8B"
    assert not holds_credential(
        "meta-llama/Meta-Llama-3-8B, the password: ask the basic responsibilities"
    )
    assert holds_credential(f"a {SECRET} b") and holds_credential("s3://k:pa55@b/x")


def test_nothing_steers_the_terminal():
    assert plain("a\x1b[31mred\x1b[0m \x1b]0;title\x07 b\nc\rd\u202etxt.exe \ud800") == (
        "ared \\x1b]0;title\\x07 b\\nc\\rd\\u202etxt.exe \\ud800"
    )
    assert plain_lines("one\n\x1b[2Jtwo") == "one\n\\x1b[2Jtwo".replace("\\x1b[2J", "\\x1b[2J")


def test_a_secret_is_hidden_before_the_line_is_cut():
    line = one_line(OSError("x" * 280 + " https://h/k?sig=" + "s" * 40), 300)
    assert len(line) <= 300 and "sss" not in line
    assert one_line(KeyError()) == "KeyError"
