"Texts that the terminal, reports and messages share."
import pytest

from aptos_fastai.common.console import console, format_duration, plural, table


@pytest.mark.parametrize('n, text', [(0, '0 hours'), (1, '1 hour'), (1., '1 hour'), (.5, '0.5 hours'), (2., '2 hours'),
                                     (1_234_567, '1234567 hours')])
def test_plural(n, text): assert plural(n, 'hour') == text


@pytest.mark.parametrize('seconds, text', [(59, '59 s'), (185, '3 min 05 s'), (7800, '2 h 10 min'),
                                           (172_800, '2 days 0 h')])
def test_format_duration(seconds, text): assert format_duration(seconds) == text


@pytest.fixture
def narrow(monkeypatch):
    "A terminal of 40 columns"
    monkeypatch.setattr(console, '_width', 40)


def test_a_table_wraps_only_where_it_may_and_between_words(narrow, capsys):
    table('runs', ['run', 'time', 'kappa'], [['a' * 20, '2 h 10 min / 3 h', '0.8']], right=('kappa',), wrap=('time',))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[3:] == [f'{"a" * 20}  2 h 10 min     0.8', f'{"":22}/ 3 h']


def test_a_row_that_does_not_fit_becomes_a_list_and_loses_nothing(narrow, capsys):
    name = 'a_long_name_' * 4
    table('runs', ['run', 'model', 'kappa'], [[name, 'mean\nof 3', '0.8'], ['b', '', '0.7']], wrap=('run',))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['runs', name, '  model: mean of 3', '  kappa: 0.8', 'b', '  kappa: 0.7']
