from __future__ import annotations

from tests.troubleshooting import PAGE, files, messages_of, page, section_of


def test_the_page_has_the_messages_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.troubleshooting"


def test_every_file_with_a_message_belongs_to_a_section() -> None:
    assert [file for file in files() if section_of(file) is None] == []


def test_a_message_is_found_with_its_short_reason() -> None:
    assert "connection refused" in messages_of("remote/reasons.py")
    assert "no endpoint is set" in messages_of("remote/route.py")
    assert "no endpoint is set for this VAE: Settings, Remote VAE, Endpoint" in messages_of("remote/route.py")
