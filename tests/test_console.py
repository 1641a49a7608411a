"Texts that the terminal, reports and messages share."
import pytest

from aptos_fastai.common.console import format_duration, plural


@pytest.mark.parametrize('n, text', [(0, '0 hours'), (1, '1 hour'), (1., '1 hour'), (.5, '0.5 hours'), (2., '2 hours'),
                                     (1_234_567, '1234567 hours')])
def test_plural(n, text): assert plural(n, 'hour') == text


@pytest.mark.parametrize('seconds, text', [(59, '59 s'), (185, '3 min 05 s'), (7800, '2 h 10 min'),
                                           (172_800, '2 days 0 h')])
def test_format_duration(seconds, text): assert format_duration(seconds) == text
