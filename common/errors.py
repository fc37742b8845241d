"""The one error that ends in one line, and suggestions for mistyped words."""
import difflib


class UserError(ValueError):
    """A mistake that the user can fix: the message is one line with the flag or file, its value and the remedy."""


class Unreachable(UserError):
    """A server that does not answer, or refuses."""


def suggestion(value: str, choices) -> str:
    """Return `; did you mean 'x'?` for the choice most similar to a mistyped value, or ''."""
    spelled = {str(choice).lower(): str(choice) for choice in choices}
    match = difflib.get_close_matches(str(value).lower(), spelled, n=1, cutoff=0.5)
    return f'; did you mean {spelled[match[0]]!r}?' if match else ''


def check_choice(flag: str, value: str, choices) -> str:
    """Return `value` if it is one of `choices`, else raise a UserError that lists them and suggests one."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f'{flag} {value!r} is not known{suggestion(value, choices)} (there are: {", ".join(choices)})')
    return value


def reason_of(error: BaseException) -> str:
    """Return the first line of a library's error message, cut to 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
