"""metrics.jsonl, taken as it is found."""
import json

import pytest

from tests.conftest import ROOT, run
from tests.test_train import losses
from training.metrics import drop_metrics_after, plot_metrics, read_metrics, summary

STEP = dict(iter=1, tokens=10, loss=2.5, tokens_per_s=5.0, retrieval_wait_s=0.1)
VAL = dict(iter=2, tokens=20, val_loss_off=2.0, val_bpb_off=1.0)


@pytest.mark.parametrize('text, count', [
    ('', 0), (json.dumps(STEP) + '\n', 1), (json.dumps(STEP) + '\n' + json.dumps(VAL), 2),
    (json.dumps(STEP) + '\n{"iter": 2, "lo', 1), ('\x00\x00\n' + json.dumps(VAL) + '\n', 1),
    ('[1, 2]\n5\nnull\n{"no": "iter"}\n{"iter": 0}\n' + json.dumps(STEP) + '\n', 1),
    (json.dumps(VAL | dict(val_loss_off=None)) + '\n' + json.dumps(STEP | dict(loss=None)), 2),
    ('[' * 100_000 + '\n' + json.dumps(dict(iter=3, tokens=30, val_bpb_off=1.0)), 1)])
def test_damaged_lines_are_left_out_and_the_rest_is_taken(tmp_path, text, count):
    path = str(tmp_path / 'metrics.jsonl')
    (tmp_path / 'metrics.jsonl').write_text(text)
    assert len(read_metrics(path)) == count
    assert 'corpus' in summary(path, 'mine')
    plot_metrics(path, str(tmp_path / 'loss.png'))
    drop_metrics_after(path, 1)
    assert all(line['iter'] <= 1 for line in read_metrics(path))


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_metrics(str(tmp_path / 'metrics.jsonl')) == []


@pytest.mark.parametrize('damage', ['missing', 'empty', 'cut', 'binary', 'not finite'])
@pytest.mark.slow
def test_a_run_resumes_whatever_became_of_its_metrics(workspace, damage):
    common = ['config.py', '--use_retrieval=False']
    run(ROOT / 'train.py', *common, '--max_iters=4', folder=workspace)
    path = workspace / 'out/metrics.jsonl'
    if damage == 'missing':
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({'empty': b'', 'cut': whole[:-20], 'binary': b'\xff\x00' * 50,
                          'not finite': whole.replace(b'"val_loss_off": ', b'"val_loss_off": NaN, "x": ')}[damage])
    run(ROOT / 'train.py', *common, '--max_iters=6', '--init_from=resume', folder=workspace)
    steps, _ = losses(workspace)
    assert [step for step in steps if step > 4] == [5, 6]
