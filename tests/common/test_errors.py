"""Messages: suggestions for mistyped words, and the reasons that libraries give."""
import pytest

from common.errors import Unreachable, UserError, check_choice, reason_of, suggestion


@pytest.mark.parametrize(('value', 'expected'), [
    ('resnet5', "; did you mean 'resnet50'?"), ('RESNET50', "; did you mean 'resnet50'?"),
    ('ViTS', "; did you mean 'vit_s'?"), ('zzz', ''), ('', '')])
def test_the_most_similar_choice_is_suggested_whatever_its_case(value, expected):
    assert suggestion(value, ['resnet50', 'vit_s', 'googlenet']) == expected


def test_a_choice_is_returned_or_an_error_lists_all_of_them():
    assert check_choice('--loss', 'b', iter(['a', 'b'])) == 'b'
    with pytest.raises(UserError, match=r"--loss 'B' is not known; did you mean 'b'\? \(there are: a, b\)"):
        check_choice('--loss', 'B', ['a', 'b'])


def test_a_reason_is_one_line_of_at_most_120_characters():
    assert reason_of(ValueError('  first\nsecond')) == 'first'
    assert reason_of(KeyError()) == 'KeyError'
    assert reason_of(ValueError('x' * 500)) == 'x' * 120


def test_a_mistake_of_the_user_is_a_value_error():
    assert issubclass(UserError, ValueError)
    assert issubclass(Unreachable, UserError)
