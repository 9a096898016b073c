"""Mail addresses, IP addresses and phone numbers in a text → placeholders (those of Dolma, arXiv:2402.00159).

Each expression takes time in proportion to the text: an unlimited run before an @ takes its square, which on a page of
base64 is minutes.
"""

import importlib
import ipaddress
import re
from collections.abc import Callable, Sequence
from functools import partial

from llmtrain.config.errors import DataError

PLACEHOLDERS = {"mail": "|||EMAIL_ADDRESS|||", "ip": "|||IP_ADDRESS|||", "phone": "|||PHONE_NUMBER|||"}

_LOCAL = r"[\w.!#$%&'*+/=?^`{|}~-]"  # before the @, at most 64 of them (RFC 5321, section 4.5.3.1.1)
_MAIL = re.compile(rf"(?<!{_LOCAL}){_LOCAL}{{1,64}}@(?:[\w-]{{1,63}}\.){{1,8}}[^\W\d_]{{2,63}}")
_IPV4 = r"(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)"
_IPV6 = r"[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])"
_IP = re.compile(rf"(?<![\w.:])(?:{_IPV4}|{_IPV6})", re.ASCII)
_IPV6_IN_USE = ipaddress.IPv6Network("2000::/3")
_LINE_WITH_SEVEN_DIGITS = re.compile(r"^.*?\d(?:[^\w\n]{0,3}\d){6}.*$", re.MULTILINE)

Mask = Callable[[str], tuple[str, int]]  # text → masked text, number of placeholders put in


def masks(kinds: Sequence[str], phone_region: str) -> dict[str, Mask]:
    """The functions that mask each kind, in the order to apply them: an IP address looks like a phone number.

    Raises DataError for a region without phone numbers.
    """
    if "phone" in kinds and phone_region not in importlib.import_module("phonenumbers").SUPPORTED_REGIONS:
        raise DataError(f"data.cleaning.phone_region: {phone_region!r} is no country (ISO 3166-1) such as US or DE")
    every: dict[str, Mask] = {"mail": mask_mail, "ip": mask_ip, "phone": partial(mask_phone, region=phone_region)}
    return {kind: mask for kind, mask in every.items() if kind in kinds}


def mask_mail(text: str) -> tuple[str, int]:
    """The text without mail addresses, and how many there were."""
    return _MAIL.subn(PLACEHOLDERS["mail"], text) if "@" in text else (text, 0)


def mask_ip(text: str) -> tuple[str, int]:
    """The text without public IPv4 and IPv6 addresses, and how many there were; private ones say nothing of anyone."""
    found = [match for match in _IP.finditer(text) if _is_public(match[0])]
    return _replaced(text, [match.span() for match in found], PLACEHOLDERS["ip"])


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and (isinstance(found, ipaddress.IPv4Address) or found in _IPV6_IN_USE)


def mask_phone(text: str, *, region: str) -> tuple[str, int]:
    """The text without phone numbers, and how many there were: those of `region`, and any with a country code."""
    phonenumbers = importlib.import_module("phonenumbers")  # optional
    strict = phonenumbers.Leniency.STRICT_GROUPING  # the laxer ones take dates and intervals for numbers
    found = [
        (line.start() + match.start, line.start() + match.end)
        for line in _LINE_WITH_SEVEN_DIGITS.finditer(text)  # the library is slow
        for match in phonenumbers.PhoneNumberMatcher(line[0], region, leniency=strict)
    ]
    return _replaced(text, found, PLACEHOLDERS["phone"])


def _replaced(text: str, spans: Sequence[tuple[int, int]], placeholder: str) -> tuple[str, int]:
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return placeholder.join(pieces), len(spans)
