"""python -m evaluation.qa: what is asked, what is read, what is scored, and what the page shows."""
import json
import math
import sys
from contextlib import ExitStack, closing

import numpy as np
import pytest
import torch

from configurator import UserError
from data.chunking import document_hash
from data.conversations import Passage, find_template, render
from data.documents import as_dataset_configs, load_documents
from data.tokenizer import load_tokenizer, token_byte_counts
from evaluation import qa
from evaluation.questions import Question
from evaluation.report import read_answers, write_report
from evaluation.scores import scores
from generation.sources import CollectionSource
from retrieval.retriever import Retriever
from tests.conftest import CHUNK, run
from tests.test_export import save_run
from training.checkpoint import load_run

EVIL = '</pre><script>document.title = "pwned"</script>'
ASKED = [('textwrap', 'What does dedent(text) do?', 'Remove any common leading whitespace'),
         ('calendar', 'What does weekday(year, month, day) do?', 'Return weekday (0-6 ~ Mon-Sun)'),
         ('heapq', 'What does heappush(heap, item) do?', 'Push item onto heap'),
         ('nowhere', f'What is {EVIL}?', 'Nothing.'), ('json.decoder', 'What does decode(s) do?', '')]


@pytest.fixture
def tuned(settings, workspace):
    """The settings of a workspace with questions.jsonl, a RETRO in `retro` and a GPT in `gpt`, of random weights."""
    lines = [dict(id=str(i), document=document, question=question,
                  answers=dict(text=[gold], answer_start=[0]) if not gold else [gold, f'{gold}, or so'],
                  ctxs=[dict(title=document, text=f'{question} {gold} ' * 3), dict(title='other', text='x = 1\n' * 9),
                        dict(title='empty', text='')])
             for i, (document, question, gold) in enumerate(ASKED)]
    (workspace / 'questions.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    given = {key: getattr(settings, key) for key in (
        'retrieval_milvus_uri', 'retrieval_embedding_model', 'retrieval_collection')}
    given |= dict(train_datasets=[dict(path='train.parquet', source='stdlib')], template='plain', passages='prompt')
    given |= dict(block_size=12 * CHUNK, retrieval_encoder_layers=1, retrieval_pointers=8)
    for name, changes in (('retro', {}), ('gpt', dict(use_retrieval=False))):
        save_run(workspace, workspace, name, **given, **changes)
    return settings


def ask(*options, monkeypatch, out_dir='retro', most=12):
    """What the command writes: the report and the lines of answers."""
    monkeypatch.setattr(sys, 'argv', ['qa', f'--out_dir={out_dir}', '--data=questions.jsonl',
                                      f'--max_new_tokens={most}', *options])
    with ExitStack() as cleanup:
        qa.main(cleanup)
    return read_answers(out_dir, 3)


@torch.no_grad()
def test_answers_and_bits_without_retrieval_are_those_of_the_plain_model_one_by_one(tuned, monkeypatch):
    report, lines = ask('--retrieval=off', '--passages=file', '--num_passages=1', monkeypatch=monkeypatch)
    _, tokenizer, model, _ = load_run('retro')
    template, sizes = find_template('plain'), token_byte_counts(tokenizer)
    for line, (document, question, gold) in zip(lines, ASKED, strict=True):
        passages = [Passage(document, f'{question} {gold} ' * 3)]
        asked = [dict(role='user', content=question)]
        prompt, _ = render(template, asked, tokenizer, passages, CHUNK)
        written = model.generate(torch.tensor(prompt[None]), 12, temperature=0)[0, len(prompt):].tolist()
        written = written[:written.index(tokenizer.eot_token)] if tokenizer.eot_token in written else written
        text = tokenizer.decode(written).partition(template.stop[0])[0].strip('\ufffd').strip()
        assert line['off']['answer'].strip('\ufffd') == text and len(line['passages']) == 1
        if not gold:
            assert line['bytes'] == line['off']['bits'] == 0
            continue
        whole, is_answer = render(template, [*asked, dict(role='assistant', content=gold)], tokenizer, passages, CHUNK)
        logits = model(torch.tensor(whole[None]))[0][0, :, :tokenizer.n_vocab].double()
        places = np.flatnonzero(is_answer)
        nats = -logits.log_softmax(-1)[places - 1, whole[places]].sum().item()
        assert line['off']['bits'] == pytest.approx(nats / math.log(2), rel=1e-4)
        assert line['bytes'] == sum(sizes[t] for t in whole[places]) == len(f' {gold}')
    assert report['bpb_off'] == pytest.approx(sum(line['off']['bits'] for line in lines) / report['bytes'])


def test_passages_of_the_collection_are_none_of_the_questions_own_document_and_change_the_answer(tuned, monkeypatch,
                                                                                                 capsys):
    report, lines = ask('--passages=collection', monkeypatch=monkeypatch)
    told = capsys.readouterr()
    assert '4 of the 5 documents that the questions name stand in the collection' in told.err
    assert set(report) >= {'f1_on', 'f1_off', 'f1_gain', 'f1_gain_interval', 'bpb_on', 'bpb_gain', 'seconds'}
    for line in lines:
        assert 1 <= len(line['passages']) <= 2
        assert f'stdlib/{line["document"]}' not in [passage['title'] for passage in line['passages']]
        for arm in ('on', 'off'):
            assert {key: line[arm][key] for key in ('f1', 'exact_match', 'rouge_l')} == scores(
                line[arm]['answer'], line['answers'])
    assert report['f1_on'] == pytest.approx(np.mean([line['on']['f1'] for line in lines]))
    assert any(line['on'] != line['off'] for line in lines) and 'retrieval on' in told.out
    low, high = report['bpb_on_interval']
    assert low <= report['bpb_on'] <= high
    without = ask('--passages=none', '--retrieval=off', monkeypatch=monkeypatch)[1]
    assert [line['off'] for line in without] != [line['off'] for line in lines]


def test_passages_as_neighbors_are_read_by_the_model_alone_and_cuts_are_counted(tuned, monkeypatch, capsys):
    report, lines = ask('--passages=file', '--passages_as=neighbors', monkeypatch=monkeypatch)
    told = capsys.readouterr().err
    assert '5 questions have passages of more than 32 tokens' in told or 'questions have passages of more' in told
    assert any(line['on']['bits'] != line['off']['bits'] for line in lines) and report['passages_as'] == 'neighbors'
    alone = ask('--passages=none', '--retrieval=off', monkeypatch=monkeypatch)[1]
    assert [line['off'] for line in alone] == [line['off'] for line in lines]  # the prompt has none
    ask('--passages=file', '--retrieval=off', '--max_new_tokens=150', monkeypatch=monkeypatch)
    assert 'had passages cut or left out, to fit the block of 192 tokens' in capsys.readouterr().err


def test_a_prompt_that_is_too_long_loses_passages_from_the_last_on_and_then_its_beginning(tuned, tokenizer):
    from collections import Counter
    from types import SimpleNamespace
    config, counts = SimpleNamespace(block_size=100, has_neighbors=False), Counter()
    template, long = find_template('plain'), 'word ' * 60
    question = Question('1', [dict(role='user', content='What is it?')], ['It is.'])
    passages = [Passage('first', 'the first one'), Passage('second', long)]
    prompt, gold, read = qa.ask(question, passages, template, tokenizer, config, 20, counts)
    text = tokenizer.decode(prompt)
    assert 70 < len(prompt) <= 80 and text.endswith('Question: What is it?\n\nAnswer:') and counts['cut passages'] == 1
    assert read[0] == passages[0] and long.startswith(read[1].text) and len(read) == 2
    assert gold == [*tokenizer.encode_ordinary(' It is.'), tokenizer.eot_token]
    question.messages[0]['content'] = f'{long}at the end?'
    prompt, _, read = qa.ask(question, passages, template, tokenizer, config, 40, counts)
    assert len(prompt) == 60 and tokenizer.decode(prompt).endswith('at the end?\n\nAnswer:') and read == []
    assert counts == {'cut passages': 2, 'cut questions': 1}
    config = SimpleNamespace(block_size=96, has_neighbors=True, retrieval_chunk_size=CHUNK)
    assert len(qa.ask(question, passages, template, tokenizer, config, 40, counts)[0]) % CHUNK == 0


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings.tokenizer)


def test_a_source_that_leaves_a_document_out_finds_nothing_in_it(settings, tokenizer):
    documents = {d.id: d.text for d in load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets'))}
    tokens = np.array(tokenizer.encode_ordinary(documents['calendar']))[None, :20 * CHUNK]
    own = document_hash('stdlib', 'calendar')
    with closing(Retriever(settings.replace(retrieval_pointers=8, retrieval_cache_gb=0.0), tokenizer)) as retriever:
        longest, nearest = [], []
        for source in (CollectionSource(retriever), CollectionSource(retriever, own)):
            pointers = source.point(tokens)[0, :-1]
            longest.append(int(pointers[..., 1].max(-1).mean()))
            nearest.append(own in source.retrieve(tokens[0].reshape(-1, CHUNK))[2]['doc_id'])
    assert nearest == [True, False] and longest[0] > 10 > 5 > longest[1]


def test_the_page_shows_questions_answers_and_passages_and_nothing_in_them_is_markup(tuned, monkeypatch, workspace):
    report, lines = ask('--passages=file', '--max_questions=4', '--shown=9', monkeypatch=monkeypatch)
    page = (workspace / 'retro/questions.html').read_text()
    assert report['questions'] == 4 and report['of'] == 5 and page.count('<article') == len(lines) == 4
    assert all(line['question'] in page for line in lines if EVIL not in line['question'])
    assert '<script>document' not in page and page.count('<script>') == 1 and 'x = 1' in page and 'gold' in page
    # and the page of python -m evaluation has them, too, while they are of its checkpoint
    other = dict(out_dir='retro', data='val', corpus='val', documents=1, tokens=2, bytes=3, notes=[], benchmarks={},
                 bpb_off=1.0, bpb_off_interval=None, loss_off=1.0)
    for step, shown in ((3, True), (4, False)):
        write_report(workspace / 'report.html', other, [], None, None, None, None, None, 'none',
                     read_answers('retro', step))
        shown_question = next(line['question'] for line in lines if EVIL not in line['question'])
        assert (shown_question in (workspace / 'report.html').read_text()) == shown


def test_a_gpt_answers_with_passages_in_its_prompt_and_no_arm_is_named_on(tuned, monkeypatch):
    report, lines = ask('--passages=collection', monkeypatch=monkeypatch, out_dir='gpt')
    assert 'f1_on' not in report and 'f1_gain' not in report and all('on' not in line for line in lines)
    assert all(line['passages'] for line in lines)


@pytest.mark.parametrize(('options', 'said'), [
    (['--retrieval=on', '--out_dir=gpt'], 'trained without retrieval: leave out --retrieval=on'),
    (['--passages=file', '--passages_as=neighbors', '--out_dir=gpt'], 'is a GPT, which reads none'),
    (['--data=bare.jsonl', '--passages=file'], '--passages=file, and the file has none'),
    (['--max_new_tokens=500'], '--max_new_tokens is 500, and the block has 192 tokens'),
    (['--passages=none', '--passages_as=prompt'], 'is given, and no passages'),
    (['--template={user}'], 'lacks the place'), (['--max_questions=-1'], 'must be at least 0'),
    (['--temperature=nan'], 'must be at least 0'), (['--out_dir=nothing'], "no checkpoint in 'nothing'"),
    (['--results=questions.jsonl'], '--results .* cannot be written'),
])
def test_what_cannot_be_asked_is_refused(tuned, workspace, monkeypatch, options, said):
    (workspace / 'bare.jsonl').write_text('{"question": "q", "answers": ["a"]}\n')
    with pytest.raises(UserError, match=said):
        ask(*options, monkeypatch=monkeypatch)


def test_the_command_ends_with_one_line_and_code_2(tuned, workspace):
    (workspace / 'bad.jsonl').write_text('{"question": "q"}\n')
    answer = run('-m', 'evaluation.qa', '--out_dir=retro', '--data=bad.jsonl', folder=workspace, check=False)
    assert answer.returncode == 2 and 'gold answers are missing' in answer.stderr and answer.stderr.count('\n') == 1
