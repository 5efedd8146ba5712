"""Checkpoints: folders that are whole before a pointer names them, and what sampling and evaluating need of them."""
import json
import os
import shutil

import pytest

from configurator import UserError
from tests.conftest import ROOT, run
from tests.test_train import losses
from training.checkpoint import list_steps, load_checkpoint, load_run

START = '--start=import textwrap\n\ndef wrap(text, width=70):\n    return [text]\n'


@pytest.fixture(scope='module')
def trained(populated, tmp_path_factory):
    """A folder with a RETRO of 12 steps in `out`, evaluated and saved every 4."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--max_iters=12', folder=folder)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of `trained` that a test may change."""
    shutil.copytree(trained, tmp_path / 'run')
    return tmp_path / 'run'


def test_a_checkpoint_is_a_folder_of_documented_files_and_the_newest_two_are_kept(trained):
    assert list_steps(trained / 'out/checkpoints') == [8, 12]
    folder = trained / 'out/checkpoints/step-12'
    assert sorted(path.name for path in folder.iterdir()) == ['meta.json', 'model.safetensors', 'optimizer.pt',
                                                              'rank-0.pt', 'tokenizer.json']
    assert (trained / 'out/checkpoints/latest').read_text() == 'step-12\n'
    assert (folder / 'tokenizer.json').read_bytes() == (trained / 'tokenizer.json').read_bytes()
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['step'] == 12 and meta['model']['n_embd'] == 32 and meta['settings']['learning_rate'] == 1e-2


def test_all_checkpoints_are_kept_if_asked_for(trained):
    run(ROOT / 'train.py', 'config.py', '--out_dir=all', '--keep_checkpoints=0', '--use_retrieval=False',
        '--eval_interval=1', '--max_iters=4', folder=trained)
    assert list_steps(trained / 'all/checkpoints') == [1, 2, 3, 4]


def test_a_copied_checkpoint_samples_and_evaluates_with_the_corpus_gone(trained, copy, tmp_path):
    """The out_dir, and the folder of one checkpoint alone, elsewhere; both give what the original gives."""
    arguments = [START, '--max_new_tokens=20', '--temperature=0']
    expected = run(ROOT / 'sample.py', *arguments, folder=trained).stdout
    (copy / 'mine.jsonl').write_text(json.dumps(dict(text=(ROOT / 'model.py').read_text()[:4000])))
    shutil.copytree(copy / 'out', tmp_path / 'elsewhere/out')
    shutil.copytree(copy / 'out/checkpoints/step-12', tmp_path / 'elsewhere/model')
    shutil.rmtree(copy / 'out')
    for name in ('train.parquet', 'val.parquet', 'tokenizer.json', 'config.py'):
        (copy / name).unlink()
    for out_dir in ('../elsewhere/out', '../elsewhere/model'):
        assert run(ROOT / 'sample.py', f'--out_dir={out_dir}', *arguments, folder=copy).stdout == expected
        run('-m', 'evaluation', f'--out_dir={out_dir}', '--data=mine.jsonl', '--results=results', folder=copy)
        report = json.loads((copy / 'results/evaluation.json').read_text())
        assert report['bpb_on'] > 0 and report['bpb_on'] != report['bpb_off']


def test_a_run_killed_between_writing_a_folder_and_its_pointer_resumes_from_the_one_before(trained, copy):
    for leftover in ('step-12', 'step-9.tmp'):  # whole but not named, and half written
        shutil.copytree(copy / 'out/checkpoints/step-8', copy / 'out/checkpoints' / leftover, dirs_exist_ok=True)
    (copy / 'out/checkpoints/step-9.tmp/meta.json').unlink()
    (copy / 'out/checkpoints/latest').write_text('step-8\n')
    assert load_checkpoint(copy / 'out').step == 8
    run(ROOT / 'train.py', 'config.py', '--max_iters=12', '--init_from=resume', folder=copy)
    assert losses(copy) == losses(trained) and load_checkpoint(copy / 'out').step == 12
    assert list_steps(copy / 'out/checkpoints') == [8, 12] and not (copy / 'out/checkpoints/step-9.tmp').exists()


def test_a_run_resumed_from_an_earlier_step_keeps_its_own_newest_checkpoints(copy):
    """The pointer is moved back by hand; what was saved beyond it neither counts nor is removed."""
    (copy / 'out/checkpoints/latest').write_text('step-8\n')
    run(ROOT / 'train.py', 'config.py', '--max_iters=10', '--init_from=resume', '--keep_checkpoints=1', folder=copy)
    assert list_steps(copy / 'out/checkpoints') == [10, 12] and load_checkpoint(copy / 'out').step == 10


def test_checkpoints_of_an_abandoned_trajectory_are_removed_first(copy):
    """The run is resumed from step 8 and passes step 12, which was saved before the pointer was moved back."""
    (copy / 'out/checkpoints/latest').write_text('step-8\n')
    run(ROOT / 'train.py', 'config.py', '--max_iters=13', '--init_from=resume', '--eval_interval=13', folder=copy)
    assert list_steps(copy / 'out/checkpoints') == [8, 13]


def test_a_run_does_not_resume_within_the_folder_of_a_checkpoint(copy):
    answer = run(ROOT / 'train.py', 'config.py', '--init_from=resume', '--out_dir=out/checkpoints/step-12',
                 folder=copy, check=False)
    assert answer.returncode == 2 and 'is the folder of a checkpoint, and a run resumes in the out_dir' in answer.stderr
    answer = run(ROOT / 'train.py', 'config.py', '--eval_only=True', '--out_dir=out/checkpoints/step-12', folder=copy)
    assert 'val_bpb_on' in answer.stdout


def test_a_pointer_out_of_the_run_is_refused(copy):
    (copy / 'out/checkpoints/latest').write_text('../../elsewhere\n')
    with pytest.raises(UserError, match="names '../../elsewhere', which is no checkpoint"):
        load_checkpoint(copy / 'out')


def test_what_a_user_gives_on_resume_takes_effect(copy):
    """AdamW's hyperparameters are those of the run, and not of the checkpoint."""
    for name, options in (('same', []), ('other', ['--weight_decay=0.9', '--beta1=0.5'])):
        shutil.copytree(copy / 'out', copy / name)
        run(ROOT / 'train.py', 'config.py', '--max_iters=15', '--init_from=resume', f'--out_dir={name}', *options,
            folder=copy)
    (same, _), (other, _) = losses(copy, 'same'), losses(copy, 'other')
    assert same[13] == other[13] and same[15] != other[15]


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(copy):
    shutil.rmtree(copy / 'out/checkpoints')
    (copy / 'out/ckpt.pt').write_bytes(b'old')
    for command in ([ROOT / 'train.py', 'config.py', '--init_from=resume'], [ROOT / 'sample.py']):
        answer = run(*command, folder=copy, check=False)
        assert answer.returncode == 2 and answer.stderr.count('\n') == 1
        assert "'out/ckpt.pt' is a checkpoint of an earlier version of nanoRETRO, which this one" in answer.stderr
    assert (copy / 'out/ckpt.pt').read_bytes() == b'old'


def test_a_new_run_sets_a_checkpoint_of_an_earlier_version_aside(copy):
    (copy / 'out/ckpt.pt').write_bytes(b'old')
    run(ROOT / 'train.py', 'config.py', '--max_iters=1', '--use_retrieval=False', folder=copy)
    assert (copy / 'out/previous-1/ckpt.pt').read_bytes() == b'old' and load_checkpoint(copy / 'out').step == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cast_away(path):
    """A weight of another shape."""
    from safetensors.torch import load_file, save_file
    weights = load_file(path)
    save_file(weights | {'transformer.ln_f.weight': weights['transformer.ln_f.weight'][:-1].contiguous()}, path)


@pytest.mark.parametrize('name, damage, said', [
    ('model.safetensors', truncate, 'is of another architecture, damaged, or no checkpoint'),
    ('model.safetensors', cast_away, 'its weights are not those of its architecture'),
    ('model.safetensors', os.remove, 'is of another architecture, damaged, or no checkpoint'),
    ('meta.json', truncate, 'is of another architecture, damaged, or no checkpoint'),
    ('meta.json', lambda path: path.write_text('{"version": 99}'), 'its layout is of another version'),
    ('tokenizer.json', os.remove, "no tokenizer"),
    ('meta.json', os.remove, "names 'step-12', which is no checkpoint.*there are steps"),
])
def test_a_damaged_checkpoint_is_refused_by_name(copy, name, damage, said):
    damage(copy / 'out/checkpoints/step-12' / name)
    with pytest.raises(UserError, match=said) as error:
        load_run(str(copy / 'out'))
    assert 'step-12' in str(error.value)


def test_a_missing_checkpoint_is_named_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in '.*nowhere': train first"):
        load_checkpoint(str(tmp_path / 'nowhere'))
