"""bench/gpu.py, so that it works the day a GPU is at hand."""
import json
import sys

import pytest

import bench.gpu
from tests.conftest import run


@pytest.mark.slow
def test_all_checks_pass_and_every_figure_is_there(tmp_path, monkeypatch, capsys):
    """The commands that it starts are forks (conftest.run); test_slow.py has it as a command."""
    monkeypatch.setattr(bench.gpu, 'run', run)
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--device=cpu', '--quick', f'--out={tmp_path}/gpu.json'])
    with pytest.raises(SystemExit) as ended:
        bench.gpu.main()
    report, shown = json.loads((tmp_path / 'gpu.json').read_text()), capsys.readouterr().out
    assert ended.value.code == 0, report
    assert report['device'] == 'CPU' and not any('FAILED' in str(value) for value in report.values())
    for arm in ('frozen', 'live', 'remembered', 'gpt'):
        assert report['training'][arm]['tokens_per_s'] > 0 and report['training'][arm]['mfu'] > 0
        assert f'{report["training"][arm]["tokens_per_s"]:,}' in shown
        assert 0 <= report['training'][arm]['waited'] < 1
    assert len(report['sizes']) == 4
    for figures in report['sizes'].values():
        assert min(figures['tokens_per_s'], figures['dry_run_gb'], figures['mfu']) > 0
    assert report['embedder_chunks_per_s'] > 0 and 'chunks in the collection' in report['corpus']
