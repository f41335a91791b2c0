"""The mail server is named by environment and file; what is wrong with it is said, the password never is."""

from datetime import UTC, datetime
from email import message_from_string
from email.policy import default

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.errors import UsageError
from locally.page.mail import MailError, Settings, address, compose, settings

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GOOD = {"HOST": "smtp.example.org", "SENDER": "page@example.org", "URL": "https://locally.example"}


@pytest.fixture
def say(monkeypatch):
    def set_all(**said: str) -> None:
        for name, value in said.items():
            monkeypatch.setenv(f"LOCALLY_MAIL_{name}", value)

    return set_all


def test_without_a_host_there_is_no_mail(say):
    assert settings() is None
    say(SENDER="page@example.org")
    assert settings() is None


def test_the_environment_counts_more_than_the_file(say, home):
    home.mkdir()
    (home / "mail.toml").write_text(
        'host = "other.example.org"\nsender = "page@example.org"\nurl = "https://locally.example/"\nport = 2525\n'
        'security = "tls"\n'
    )
    assert settings() == Settings(
        "other.example.org", "page@example.org", "https://locally.example/", security="tls", port=2525
    )
    say(HOST="smtp.example.org", TIMEOUT="7.5")
    found = settings()
    assert (found.host, found.port, found.timeout) == ("smtp.example.org", 2525, 7.5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"SENDER": ""}, "LOCALLY_MAIL_SENDER"),
        ({"URL": ""}, "LOCALLY_MAIL_URL"),
        ({"URL": "locally.example"}, "https://"),
        ({"PORT": "many"}, "port must be a number"),
        ({"PORT": "99999"}, "port must be 1 to 65535"),
        ({"TIMEOUT": "nan"}, "timeout"),
        ({"SECURITY": "ssl"}, "starttls, tls, none"),
        ({"SECURITY": "none", "USER": "page", "PASSWORD": "sesame"}, "in the clear"),
        ({"SENDER": "page"}, "e-mail address"),
    ],
)
def test_what_cannot_be_is_named(say, wrong, says):
    say(**(GOOD | wrong))
    with pytest.raises(UsageError, match=says) as caught:
        settings()
    assert "sesame" not in str(caught.value)


def test_a_password_that_others_can_read_is_refused(home):
    home.mkdir()
    file = home / "mail.toml"
    file.write_text(
        'host = "smtp.example.org"\nsender = "p@example.org"\nurl = "https://a.example"\npassword = "sesame"'
    )
    file.chmod(0o644)
    with pytest.raises(MailError, match="chmod 600") as caught:
        settings()
    assert "sesame" not in str(caught.value)
    file.chmod(0o600)
    found = settings()
    assert found.secret() == "sesame"
    assert "sesame" not in repr(found)
    for text, says in (
        ("hosts = 'a'", "no setting 'hosts'"),
        ("host = [1]", "text or a number"),
        ("host", "cannot read"),
    ):
        file.write_text(text)
        with pytest.raises(MailError, match=says):
            settings()


def test_a_missing_password_file_is_named():
    with pytest.raises(MailError, match="password_file /nowhere"):
        Settings("h", "p@example.org", "https://a.example", password_file="/nowhere").secret()


@given(st.text(max_size=80))
def test_an_address_is_refused_or_safe_in_a_header_and_a_command(text):
    try:
        found = address(text)
    except UsageError:
        return
    assert found.isascii()
    assert not set(found) & set(' \t\r\n<>,;:"\\()\0')
    assert address(found) == found


@given(st.text(max_size=60), st.text(max_size=200))
def test_no_header_is_injected(subject, text):
    try:
        sent = compose("p@example.org", "a@example.org", subject, text, "<p>", message_id="<1@x>", when=WHEN)
    except ValueError:
        assert len(f"{subject}.".splitlines()) > 1
        return
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    assert sent.isascii()
    read = message_from_string(sent, policy=default)
    expected = ["From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type"]
    assert list(read.keys()) == expected
