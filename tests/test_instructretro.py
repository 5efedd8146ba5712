"""InstructRetro's open sets, from small copies in the Hub's formats, which are read as the Hub's are."""
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configurator import UserError, load_settings
from data.conversations import read_conversations
from data.documents import as_dataset_configs
from data.instructretro import prepare
from tests.conftest import ROOT


def message(key, parent, role, text, tree='tree'):
    return dict(message_id=key, parent_id=parent, role=role, text=text, lang='en', deleted=False, message_tree_id=tree)


COPIES = dict(
    soda=[dict(speakers=['Ann', 'Bo', 'Ann'], dialogue=['Hi Bo.', 'Hi Ann.', 'Bye.'], narrative='They meet.'),
          dict(speakers=['Ann', 'Ann'], dialogue=['Hi.', 'Hello?'], narrative='Alone.')],
    eli5=[dict(question='Why is the sky blue?', answer='It scatters blue light.')],
    askscience=[dict(title='Why is ice slippery?', selftext='Really?', answers=dict(
        text=['No idea.', 'A film of water.'], score=[1, 5]))],
    askhistorians=[dict(title='Who built it?', selftext='', answers=dict(text=['They did.'], score=[2]))],
    self_instruct=[dict(prompt='Name a color.\n\nOutput:', completion=' Red<|endoftext|>'),
                   dict(prompt='Tell a story.', completion='once ' * 50), dict(prompt='Say nothing.', completion='')],
    unnatural_instructions=[dict(instruction='Add.', instances=[dict(
        instruction_with_input='Add 1 and 2.', input='1 and 2', constraints='', output='3')])],
    flan_cot=[dict(inputs='Is 2 even? Think.', targets='2 = 2 * 1. Yes.')],
    dolly=[dict(instruction='Who wrote it?', context='Ann wrote it.', response='Ann.', category='closed_qa'),
           dict(instruction='Name a color.', context='', response='Red.', category='open_qa')],
    oasst=[message('1', None, 'prompter', 'Hi'), message('2', '1', 'assistant', 'Hello'),
           message('3', '1', 'assistant', 'Good day'), message('4', '2', 'prompter', 'Code?'),
           message('5', '4', 'assistant', '```x = 1```'), message('6', '3', 'prompter', 'No answer'),
           message('7', None, 'prompter', 'Alone', 'other')])


@pytest.fixture
def copies(tmp_path, monkeypatch):
    folder = tmp_path / 'copies'
    folder.mkdir()
    for name, rows in COPIES.items():
        if name == 'dolly':
            (folder / 'dolly.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f'{name}.parquet')
    monkeypatch.setattr(prepare, 'FOLDER', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', f'--from={folder}'])
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder.parent / f'{name}.jsonl').read_text().splitlines()]


def said(conversation):
    return [message['content'] for message in conversation['messages']]


def test_each_set_becomes_conversations_and_oasst_the_paths_to_answers_that_nobody_replied_to(copies, capsys):
    prepare.main()
    assert [said(one) for one in read(copies, 'soda')] == [['Hi Bo.', 'Hi Ann.']]
    assert said(read(copies, 'askscience')[0]) == ['Why is ice slippery?\n\nReally?', 'A film of water.']
    assert said(read(copies, 'askhistorians')[0]) == ['Who built it?', 'They did.']
    assert said(read(copies, 'self_instruct_short')[0]) == ['Name a color.', 'Red']
    assert said(read(copies, 'self_instruct_long')[0])[0] == 'Tell a story.'
    assert said(read(copies, 'unnatural_instructions')[0]) == ['Add 1 and 2.', '3']
    assert sorted(map(said, read(copies, 'dolly'))) == [['Name a color.', 'Red.'],
                                                        ['Who wrote it?\n\nAnn wrote it.', 'Ann.']]
    paths = {name: [(one['id'], one['document'], *said(one)) for one in read(copies, name)]
             for name in ('oasst', 'oasst_code')}
    assert paths == dict(oasst=[('3', 'tree', 'Hi', 'Good day')],
                         oasst_code=[('5', 'tree', 'Hi', 'Hello', 'Code?', '```x = 1```')])
    assert 'of 1 of soda; 1 without two sides' in capsys.readouterr().out


def test_the_config_blends_the_files_that_are_written_by_the_published_shares(copies, monkeypatch):
    prepare.main()
    settings = load_settings([str(ROOT / 'config/sft_instructretro.py')])
    monkeypatch.chdir(copies.parent)
    configs = as_dataset_configs(settings.train_datasets, 'train_datasets')
    assert sum(config.weight for config in configs) == pytest.approx(1)
    assert settings.batch_size * settings.gradient_accumulation_steps == 128
    names = {file for _, _, files in prepare.SETS.values() for file in files}
    assert {config.path for config in configs} == {f'data/instructretro/{name}.jsonl' for name in names}
    for config in configs:
        config.path, config.val_fraction = config.path.rpartition('/')[2], 0
        assert all(conversation.messages for conversation in read_conversations(config))


def test_what_cannot_be_read_is_named_and_the_other_sets_are_written(copies, monkeypatch, capsys):
    (copies / 'eli5.parquet').unlink()
    pq.write_table(pa.table({'text': ['x']}), copies / 'flan_cot.parquet')
    with pytest.raises(UserError, match='eli5, flan_cot could not be read'):
        prepare.main()
    told = capsys.readouterr().err
    assert 'has 0 files or folders that are called eli5' in told and "KeyError: 'inputs'" in told
    assert read(copies, 'dolly') and not (copies.parent / 'flan_cot.jsonl').exists()
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--sets=dolli'])
    with pytest.raises(UserError, match="'dolli', which is none of soda, eli5"):
        prepare.main()
    monkeypatch.setattr(sys, 'argv', ['prepare.py', f'--from={copies}', '--sets=dolly', '--most=1'])
    prepare.main()
    assert len(read(copies, 'dolly')) == 1
