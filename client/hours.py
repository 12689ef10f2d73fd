"""When a hospital's node answers: days and times of the week in the hospital's own time zone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import cached_property
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_SPAN = re.compile(r"(?P<days>[A-Za-z,-]+) (?P<begin>\d\d:\d\d)-(?P<end>\d\d:\d\d)")
WANTED = "wanted days and times such as 'Mon-Fri 18:00-06:00' or 'Sat,Sun 00:00-24:00'"


@dataclass(frozen=True)
class Span:
    """From `begin` to `end`, in minutes of the day, on weekdays from Monday = 0; where it ends before it begins, on the next day."""

    days: frozenset[int]
    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Raises `ValueError` with what is wanted."""
        found = _SPAN.fullmatch(text.strip())
        if not found:
            raise ValueError(f"{text!r}: {WANTED}")
        days: set[int] = set()
        for part in found["days"].split(","):
            first, _, last = part.partition("-")
            try:
                a, b = DAYS.index(first.title()), DAYS.index((last or first).title())
            except ValueError:
                raise ValueError(f"{text!r}: {part!r} names no days; {WANTED}") from None
            days |= {d % 7 for d in range(a, b + 1 if b >= a else b + 8)}
        begin, end = _minutes(found["begin"], text), _minutes(found["end"], text)
        if begin == end:
            raise ValueError(f"{text!r} begins when it ends; the whole day is 00:00-24:00")
        return cls(frozenset(days), begin, end)

    def on(self, day: date) -> tuple[datetime, datetime] | None:
        """When it begins and ends if it begins on this day, as clocks there show it."""
        if day.weekday() not in self.days:
            return None
        length = self.end - self.begin if self.end > self.begin else self.end + 24 * 60 - self.begin
        begin = datetime.combine(day, time()) + timedelta(minutes=self.begin)
        return begin, begin + timedelta(minutes=length)


@dataclass(frozen=True)
class Hours:
    """The spans in which requests are answered; without any, always."""

    texts: tuple[str, ...]
    zone: str = "UTC"

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        return tuple(map(Span.parse, self.texts))

    def opens(self, now: datetime) -> datetime | None:
        """When it is open again, in the hospital's time; None where it is open at `now` (a time that knows its zone)."""
        if not self.texts:
            return None
        zone = zone_of(self.zone)
        there = now.astimezone(zone).replace(tzinfo=None)
        begins = []
        for shift in range(-1, 8):
            for span in self.spans:
                when = span.on(there.date() + timedelta(days=shift))
                if when is None:
                    continue
                if when[0] <= there < when[1]:
                    return None
                if when[0] > there:
                    begins.append(when[0])
        return min(begins).replace(tzinfo=zone)


def zone_of(name: str) -> ZoneInfo:
    """Raises `ValueError` where there is no such time zone."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"time_zone = {name!r} is none of the tz database; write one such as 'Europe/Berlin'"
        ) from None


def check(texts: Iterable[str], zone: str) -> None:
    """Raise `ValueError` on hours that cannot be read."""
    for text in texts:
        Span.parse(text)
    zone_of(zone)


def _minutes(clock: str, text: str) -> int:
    hours, minutes = map(int, clock.split(":"))
    if hours > 24 or minutes > 59 or (hours == 24 and minutes):
        raise ValueError(f"{text!r}: {clock} is no time of the day; {WANTED}")
    return 60 * hours + minutes
