import base64
import random
import time

import pytest

from llmtrain.config.errors import DataError
from llmtrain.data.pii import mask_ip, mask_mail, mask_phone, masks

MAIL, IP, PHONE = "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||", "|||PHONE_NUMBER|||"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jo.doe+news@mail.example.com.", f"Write to {MAIL}."),
        ("<jo@example.org>,ed@example.org", f"<{MAIL}>,{MAIL}"),
        ("mailto:jo@example.com?subject=hi", f"mailto:{MAIL}?subject=hi"),
        ("jörg@müller.de", MAIL),
        ("meet @ noon, @jo and jo@localhost", None),
        ("git@2.0.1", None),
    ],
)
def test_mail(text: str, masked: str | None) -> None:
    expected = (masked, masked.count(MAIL)) if masked else (text, 0)
    assert mask_mail(text) == expected


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("from 8.8.8.8, port 53", f"from {IP}, port 53"),
        ("http://8.8.4.4:80/", f"http://{IP}:80/"),
        ("(2001:4860:4860::8888)", f"({IP})"),
        ("at 8.8.8.8.", f"at {IP}."),
        ("127.0.0.1 10.1.2.3 192.168.0.1 ::1 fe80::1", None),
        ("999.8.8.8 and 1.2.3.4.5 and v8.8.8.8", None),
        ("at 10:30:15, std::vector, a::b, face::bad", None),
    ],
)
def test_ip(text: str, masked: str | None) -> None:
    expected = (masked, masked.count(IP)) if masked else (text, 0)
    assert mask_ip(text) == expected


@pytest.mark.parametrize(
    ("text", "region", "masked"),
    [
        ("Call (202) 456-1111 or\n+49 30 901820 now", "US", f"Call {PHONE} or\n{PHONE} now"),
        ("Tel. 030 901820", "DE", f"Tel. {PHONE}"),
        ("Tel. 030 901820", "US", None),
        ("from 2012-2013, on 13.10.2021 at 12:30:15", "US", None),
        ("123456 and 12 34 56 and 192.168.100.200", "US", None),
        ("Order 20240101123456789012", "US", None),
    ],
)
def test_phone(text: str, region: str, masked: str | None) -> None:
    expected = (masked, masked.count(PHONE)) if masked else (text, 0)
    assert mask_phone(text, region=region) == expected


def test_ip_addresses_are_no_phone_numbers() -> None:
    """They are masked first."""
    text = "201.255.82.22"
    for mask in masks(["phone", "ip"], "US").values():
        text, _ = mask(text)
    assert text == IP


def test_an_unknown_region_is_named() -> None:
    with pytest.raises(DataError, match="'XX' is no country"):
        masks(["phone"], "XX")
    assert list(masks(["mail"], "XX")) == ["mail"]


@pytest.mark.parametrize("mask", masks(["mail", "ip", "phone"], "US").values(), ids=["mail", "ip", "phone"])
@pytest.mark.parametrize("unit", ["base64", "a.", "1", "1:", "12-", "a@", "a@b."])
def test_time_grows_with_the_text_not_with_its_square(mask, unit: str) -> None:
    long = 400_000
    if unit == "base64":
        text = base64.b64encode(random.Random(0).randbytes(long)).decode() + "@"
    else:
        text = unit * (long // len(unit))
    start = time.process_time()
    mask(text)
    assert time.process_time() - start < 5  # the square takes minutes
