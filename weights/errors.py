"""The one error class that the library raises for its users."""


class ConsistoryError(Exception):
    """Something that the user can fix; the message is one line that says how."""
