"""The one kind of error that ends in one line, and suggestions for what was mistyped."""
import difflib


class UserError(ValueError):
    """Something that the person at the keyboard can mend: one line with the flag or file, the value and the remedy."""


class Unreachable(UserError):
    """A server that is asked for a collection, and does not answer or refuses."""


def nearest(value: str, choices) -> str:
    """Return `; did you mean 'x'?` for the choice nearest to a mistyped value, or nothing."""
    spelled = {str(choice).lower(): str(choice) for choice in choices}
    match = difflib.get_close_matches(str(value).lower(), spelled, n=1, cutoff=0.5)
    return f'; did you mean {spelled[match[0]]!r}?' if match else ''


def check_choice(flag: str, value: str, choices) -> str:
    """Return `value` if it is one of `choices`, else raise a UserError that lists them and suggests the nearest."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{flag} {value!r} is not known{nearest(value, choices)} (there are: {", ".join(choices)})')
    return value


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error of a library says, cut to fit into a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
