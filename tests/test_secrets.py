"""One list of secrets' names: what a config is refused for, a provider's error does not show."""

import pytest

from emarecipes._secrets import check_no_secrets, is_secret
from emarecipes.errors import UserError
from emarecipes.provider import error_line

VALUE = "planted-0123456789"

NAMES = [
    "SSH_PASSPHRASE", "PGP_PASSWD", "SMTP_PASS", "PGPASSWORD", "HF_TOKEN", "OPENAI_API_KEY",
    "OPENAI_APIKEY", "AWS_ACCESS_KEY_ID", "AWS_BEARER_TOKEN_BEDROCK", "CLIENT_SECRET_2",
    "GOOGLE_APPLICATION_CREDENTIALS", "api_tokens", "TOKENIZER_API_KEY",
]  # fmt: skip
OTHERS = [
    "TOKENIZERS_PARALLELISM", "KEYBOARD", "XKB_KEYMAP", "MAX_NEW_TOKENS", "TOKENS_PER_STEP",
    "PATH", "PWD", "COMPASS", "BYPASS_CACHE",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_refused_in_a_config_and_masked_in_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, VALUE)
    for tree in ({"a": [f"x{VALUE}y"]}, {"a": f"${{oc.env:{name}}}"}):
        with pytest.raises(UserError) as error:
            check_no_secrets(tree, lambda key: f"at {key}")
        assert str(error.value).startswith("at a") and f"${name}" in str(error.value)
        assert VALUE not in str(error.value)
    assert error_line(RuntimeError(f"no access with {VALUE}.")) == "no access with ***."


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_may_be_read_and_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_secret(name)
    monkeypatch.setenv(name, VALUE)
    check_no_secrets({"a": [VALUE, f"${{oc.env:{name}}}"]}, str)
    assert error_line(RuntimeError(VALUE)) == VALUE


def test_a_secret_that_another_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", VALUE)
    monkeypatch.setenv("B_KEY", f"{VALUE}-and-more")
    assert error_line(RuntimeError(f"refused {VALUE}-and-more")) == "refused ***"


def test_a_short_value_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """`x`, as vLLM's key is said to be: it would be found in every word."""
    monkeypatch.setenv("VLLM_API_KEY", "x")
    check_no_secrets({"a": "text"}, str)
    assert error_line(RuntimeError("text")) == "text"
