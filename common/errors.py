"""Errors whose text may be read by the other party."""


class Refusal(ValueError):
    """A refusal whose text may leave the hospital: it names site, field, value wanted and remedy, never a patient.

    Any other exception crosses the wire as its type's name only; its text stays in the log of the site where it happened.
    """
