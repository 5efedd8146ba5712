"""What is logged to Weights & Biases, read back from the file that an offline run leaves."""
import json
import struct

import pytest

from tests.conftest import ROOT, SHARED, run

OFFLINE = dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR='')


def records(folder):
    """Every record of each offline run in the folder: {run's name: [Record]}."""
    from wandb.proto.wandb_internal_pb2 import Record
    runs = {}
    for path in sorted(folder.glob('**/*.wandb')):
        data, at, part, found = path.read_bytes(), 7, b'', []  # LevelDB's log format, after a header of 7 bytes
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack('<IHB', data[at:at + 7])
            if kind == 0:
                break
            part += data[at + 7:at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                record = Record()
                record.ParseFromString(part)
                found.append(record)
                part = b''
        name, = {record.run.display_name for record in found if record.run.display_name}
        runs[name] = found
    return runs


def history(found):
    """[{key: value}] of what was logged, nested keys joined by dots."""
    return [{'.'.join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in found if record.history.item]


def test_training_and_evaluation_log_curves_scores_samples_and_the_report(workspace):
    env = OFFLINE | dict(WANDB_DIR=str(workspace))
    options, more = ['--wandb_log=True', '--wandb_run_name=mine', '--retrieval_milvus_token=hush'], []
    if (SHARED / 'data/logiqa-eval.txt').exists():
        (workspace / 'data').mkdir()
        questions = (SHARED / 'data/logiqa-eval.txt').read_text().strip().split('\n\n')[:6]
        (workspace / 'data/LogiQA.txt').write_text('\n\n' + '\n\n'.join(questions) + '\n')
        more = ["--multiple_choice_benchmarks=['LogiQA']", '--benchmark_data_dir=data']
    run(ROOT / 'train.py', 'config.py', *options, *more, folder=workspace, env=env)
    run('-m', 'evaluation', '--max_tokens=3000', *options, folder=workspace, env=env)
    runs = records(workspace)
    assert set(runs) == {'mine', 'mine evaluation'}

    training = history(runs['mine'])
    logged = {key for line in training for key in line}
    assert {'loss', 'lr', 'tokens_per_s', 'retrieval_wait_s', 'chunks_embedded', 'val_bpb_on', 'val_bpb_off'} <= logged
    lines = [json.loads(line) for line in (workspace / 'out/metrics.jsonl').read_text().splitlines()]
    assert ({line['_step']: line['loss'] for line in training if 'loss' in line}
            == {line['iter']: line['loss'] for line in lines if 'loss' in line})
    assert ({line['_step']: line['val_bpb_on'] for line in training if 'val_bpb_on' in line}
            == {line['iter']: line['val_bpb_on'] for line in lines if 'val_bpb_on' in line})
    if more:
        assert 'benchmarks.LogiQA.on' in logged
    tables = [json.loads(path.read_text()) for path in workspace.glob('**/media/table/samples*.json')]
    assert len(tables) == 3 and all(table['columns'] == ['prompt', 'on', 'off', 'neighbors'] for table in tables)
    for row in tables[-1]['data']:
        assert len(row) == 4 and row[1] and row[2] and 'stdlib/' in row[3]

    report = json.loads((workspace / 'out/evaluation.json').read_text())
    evaluation, = history(runs['mine evaluation'])
    assert evaluation['bpb_on'] == report['bpb_on'] and evaluation['gain_over_off'] == report['gain_over_off']
    assert {'leakage', 'similarity', 'report'} <= {key.partition('.')[0] for key in evaluation}
    names = {entry.path for record in runs['mine evaluation'] if record.request.log_artifact.artifact.name or
             record.artifact.name
             for entry in (record.artifact.manifest.contents or record.request.log_artifact.artifact.manifest.contents)}
    assert {'report.html', 'evaluation.json', 'leakage.png', 'similarity.png'} <= names
    for path in workspace.glob('wandb/**/*'):
        assert path.is_dir() or b'hush' not in path.read_bytes()


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_a_new_one_does_not(workspace):
    env = OFFLINE | dict(WANDB_DIR=str(workspace))
    common = ['config.py', '--use_retrieval=False', '--wandb_log=True']
    for name, options in (('first', ['--max_iters=4']), ('resumed', ['--init_from=resume']), ('new', [])):
        run(ROOT / 'train.py', *common, *options, f'--wandb_run_name={name}', folder=workspace, env=env)
    ids = {name: {record.run.run_id for record in found if record.run.run_id} for name, found in
           records(workspace).items()}
    assert ids['first'] == ids['resumed'] != ids['new'] and all(len(found) == 1 for found in ids.values())
    steps = [line['_step'] for line in history(records(workspace)['resumed']) if 'loss' in line]
    assert steps == [5, 6, 7, 8]
