"""Conversations as training sequences: their order, packing, targets, and what is cut."""
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from configurator import UserError, load_settings
from data.conversation_stream import ConversationSet, ConversationStream, Writer, as_batch, val_conversations
from data.conversations import find_template, render
from data.documents import DatasetConfig
from data.tokenizer import load_tokenizer
from model import RETRO, RETROConfig
from retrieval.given import GivenPassages
from tests.conftest import CHUNK, TRAIN

CHUNKS = 8
BLOCK = CHUNKS * CHUNK


@pytest.fixture(scope='module')
def tokenizer(prepared):
    return load_tokenizer(str(prepared / 'tokenizer.json'))


def make_settings(**changes):
    return load_settings([]).replace(template='plain', block_size=BLOCK, retrieval_chunk_size=CHUNK,
                                     retrieval_pointers=4, retrieval_k_neighbors=2, **changes)


def ask(number, words=4, document=None):
    """A question about a module and its answer of some words."""
    name = TRAIN[number % len(TRAIN)]
    answer = ' '.join(f'{name}{i}' for i in range(words))
    return dict(id=str(number), document=document or name, messages=[
        dict(role='user', content=f'What is in {name}?'), dict(role='assistant', content=answer)],
        ctxs=[dict(title=name, text=f'import {name}\n{answer}'), dict(title='', text='def f(x):\n    return x')])


def open_set(path, rows, tokenizer, settings=None, **options):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    settings = settings or make_settings()
    return ConversationSet(DatasetConfig(str(path), **options), Writer(settings, tokenizer), settings)


@pytest.fixture
def dataset(tmp_path, tokenizer):
    return open_set(tmp_path / 'x.jsonl', [ask(i, 1 + i % 9) for i in range(90)], tokenizer)


def make_model(tokenizer, **changes):
    torch.manual_seed(0)
    model = RETRO(RETROConfig(**dict(
        block_size=BLOCK, vocab_size=tokenizer.n_vocab, n_layer=3, n_head=2, n_embd=32, retrieval_layers=[2, 3],
        retrieval_chunk_size=CHUNK, retrieval_pointers=4) | changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batches_of(dataset, settings, count, **options):
    """Batches with the passages that are given."""
    stream = ConversationStream([dataset], BLOCK, 4, **options)
    return GivenPassages(settings, dataset.writer.tokenizer).retrieve_for(list(itertools.islice(stream, count)))


def loss_of(model, batch):
    batch = batch.to(torch.device('cpu'))
    with torch.no_grad():
        return model(batch.tokens, batch.targets, *batch.retrieved[:2], batch.doc_ids, batch.pointers, 'sum')[1].item()


@pytest.mark.parametrize('options', [{}, dict(retrieval_encoder_layers=1), dict(use_retrieval=False)],
                         ids=['copying', 'encoder', 'gpt'])
def test_the_loss_of_packed_conversations_is_that_of_a_slow_loop_over_them_one_at_a_time(
        tmp_path, tokenizer, options):
    """Each alone in a sequence, at its place, where it has its positions; nats of its answers' tokens one by one."""
    settings = make_settings(passages='neighbors' if options != dict(use_retrieval=False) else '', **{
        'use_retrieval': True, **options})
    rows = [ask(i, 1 + i % 9) for i in range(40)]
    dataset = open_set(tmp_path / 'x.jsonl', rows, tokenizer, settings)
    model, align = make_model(tokenizer, **options), CHUNK if settings.use_retrieval else 0
    conversations = {c.id: c for c in dataset.conversations}
    stream = ConversationStream([dataset], BLOCK, 4)
    seen = 0
    for _ in range(3):
        bins = stream.pack_step()
        batch, = GivenPassages(settings, tokenizer).retrieve_for([as_batch(bins, CHUNKS, CHUNK, tokenizer.eot_token)])
        packed, slow = loss_of(model, batch), 0.0
        ids = {tuple(render(find_template('plain'), c.messages, tokenizer, align=align)[0]): i
               for i, c in conversations.items()}
        for line in bins:
            place = 0
            for example in line:
                conversation = conversations[ids[tuple(example.tokens)]]
                tokens, is_answer = render(find_template('plain'), conversation.messages, tokenizer, align=align)
                alone = as_batch([[example]], CHUNKS, CHUNK, tokenizer.eot_token)
                alone.given = [[(place, place + len(example.chunk_ids), alone.given[0][0][2])]]
                start, count = place * CHUNK, len(example.chunk_ids) * CHUNK
                for values, fill, n in ((alone.tokens, tokenizer.eot_token, CHUNK), (alone.doc_ids, 0, 1)):
                    kept = values[0, :count // CHUNK * n].copy()
                    values[:] = fill
                    values[0, place * n:place * n + len(kept)] = kept
                alone, = GivenPassages(settings, tokenizer).retrieve_for([alone])
                alone = alone.to(torch.device('cpu'))
                with torch.no_grad():
                    logits, _ = model(alone.tokens, None, *alone.retrieved[:2], alone.doc_ids, alone.pointers)
                log_p = logits[0].log_softmax(-1)
                for t in range(1, len(tokens)):
                    if is_answer[t]:
                        slow -= log_p[start + t - 1, tokens[t]].item()
                seen += 1
                place += len(example.chunk_ids)
        assert packed == pytest.approx(slow, rel=1e-5)
    assert seen > 12 and any(len(line) > 1 for line in bins)


@pytest.mark.parametrize('encoder', [0, 1])
def test_packing_hands_nothing_from_one_conversation_to_another(tmp_path, tokenizer, encoder):
    """By gradient, and by value where none flows, with token mix, own context, neighbors and pointers on."""
    settings = make_settings(passages='neighbors')
    dataset = open_set(tmp_path / 'x.jsonl', [ask(i, 2) for i in range(20)], tokenizer, settings)
    batch = batches_of(dataset, settings, 1)[0].to(torch.device('cpu'))
    model = make_model(tokenizer, retrieval_encoder_layers=encoder)
    row = next(i for i, ids in enumerate(batch.doc_ids.tolist()) if len(set(ids) - {0}) > 1)
    tokens, ids, neighbors, mask, pointers = (x[row:row + 1] for x in (
        batch.tokens, batch.doc_ids, batch.neighbors, batch.neighbor_mask, batch.pointers))
    assert mask.any() and pointers[..., 1].any() and (tokens[:, 1:] == tokenizer.eot_token).any()
    document, embedded = ids.repeat_interleave(CHUNK, dim=1)[0], {}
    handle = model.transformer.wte.register_forward_hook(
        lambda _, inputs, output: embedded.setdefault(inputs[0].dim(), output))
    logits, _ = model(tokens, None, neighbors, mask, ids, pointers)
    handle.remove()
    for doc_id in set(ids[0].tolist()) - {0}:
        own = document == doc_id
        kinds = [2, 3] if encoder else [2]
        gradients = torch.autograd.grad(logits[0, own].square().sum(), [embedded[k] for k in kinds], retain_graph=True)
        assert gradients[0][0, own].abs().sum(-1).gt(0).all() and gradients[0][0, ~own].abs().max() == 0
        for gradient in gradients[1:]:
            assert gradient[(ids == doc_id)[0]].abs().max() > 0 and gradient[(ids != doc_id)[0]].abs().max() == 0
        others = [torch.where(own, tokens, (tokens + 1) % 999), neighbors.clone(), pointers.clone()]
        others[1][0, ids[0] != doc_id] ^= 1
        others[2][0, ~own, :, 0] ^= 1
        changed, _ = model(others[0], None, others[1], mask, ids, others[2])
        torch.testing.assert_close(changed[0, own], logits[0, own], rtol=0, atol=1e-5)
        assert not torch.allclose(changed[0, ~own], logits[0, ~own], atol=1e-3)


def test_an_epoch_holds_each_conversation_once_whole_and_never_two_of_one_document_in_a_sequence(dataset):
    stream, found = ConversationStream([dataset], BLOCK, 3), Counter()
    while stream.taken[0] < 2 * len(dataset):
        for line in stream.pack_step():
            documents = [example.doc_id for example in line]
            assert len(set(documents)) == len(documents)
            assert sum(len(example.chunk_ids) for example in line) <= CHUNKS
            found.update(tuple(example.tokens) for example in line)
    found.update(tuple(example.tokens) for _, example in stream.waiting)
    assert len(found) == len(dataset) and min(found.values()) >= 2 and max(found.values()) <= 3


def test_the_order_follows_from_the_seed_and_the_conversations_not_from_their_files(tmp_path, tokenizer, dataset):
    def order(dataset, seed=0):
        return [batch.chunk_ids.tolist() for batch in itertools.islice(
            ConversationStream([dataset], BLOCK, 4, seed=seed), 12)]
    rows = [ask(i, 1 + i % 9) for i in range(90)]
    other = open_set(tmp_path / 'y.jsonl', rows[::-1], tokenizer)
    assert order(dataset) == order(other) != order(dataset, seed=1)
    assert dataset.hash == other.hash


def test_targets_are_the_answers_tokens_and_an_aligned_prompt_ends_with_its_chunk(dataset, tokenizer):
    batch = next(ConversationStream([dataset], BLOCK, 4))
    for tokens, targets, ids, is_last in zip(batch.tokens, batch.targets, batch.doc_ids, batch.is_last_chunk,
                                             strict=True):
        for t in np.flatnonzero(targets >= 0):
            assert targets[t] == tokens[t + 1] and ids[t // CHUNK] == ids[(t + 1) // CHUNK]
        for t in np.flatnonzero((targets[1:] >= 0) & (targets[:-1] < 0)):
            assert (t + 2) % CHUNK == 0  # an answer's first token is predicted by the last one of a chunk
        assert (is_last[:-1] | (ids[:-1] == ids[1:])).all() and is_last[-1]
        assert ((ids != 0) | is_last).all()
    written = tokenizer.decode(batch.targets[batch.targets >= 0].tolist()).split('<|endoftext|>')[:-1]
    answers = {c.messages[1]['content'] for c in dataset.conversations}
    assert {answer.strip() for answer in written} <= answers and len(written) > 4


def test_weights_are_reached_as_shares_of_conversations(tmp_path, tokenizer):
    sets = [open_set(tmp_path / f'{name}.jsonl', [ask(i, words, f'{name}{i}') for i in range(30)], tokenizer,
                     weight=weight) for name, words, weight in (('short', 1, 3.0), ('long', 9, 1.0))]
    stream, drawn = ConversationStream(sets, BLOCK, 8), Counter()
    for _ in range(40):
        drawn.update(example.doc_id for line in stream.pack_step() for example in line)
    counts = [[drawn[c.doc_id] for c in opened.conversations] for opened in sets]
    assert sum(counts[0]) / sum(map(sum, counts)) == pytest.approx(0.75, abs=0.05)
    assert stream.state()['taken'][0] / stream.taken.sum() == pytest.approx(0.75, abs=0.005)
    with pytest.raises(UserError, match='used up, after 90 conversations'):
        once = open_set(tmp_path / 'once.jsonl', [ask(i) for i in range(30)], tokenizer, epochs=3)
        for _ in ConversationStream([once], BLOCK, 8):
            pass


@pytest.mark.parametrize('steps', [1, 9])
def test_a_resumed_stream_goes_on_with_the_very_next_conversations(dataset, steps):
    stream = ConversationStream([dataset], BLOCK, 4)
    for _ in range(steps):
        batch = next(stream)
    state = json.loads(json.dumps(batch.state))
    resumed = ConversationStream([dataset], BLOCK, 4, state=state)
    for _ in range(20):
        ours, theirs = next(stream), next(resumed)
        assert (ours.tokens == theirs.tokens).all() and (ours.targets == theirs.targets).all()
        assert ours.state == theirs.state and (ours.chunk_ids == theirs.chunk_ids).all()


def test_ranks_and_micro_batches_share_the_sequences_of_one_process(dataset):
    whole = ConversationStream([dataset], BLOCK, 4)
    micro = ConversationStream([dataset], BLOCK, 2, step_size=4)
    ranks = [ConversationStream([dataset], BLOCK, 2, step_size=4, first=first, count=2) for first in (0, 2)]
    for step in range(20):
        expected, one, two = next(whole), next(micro), next(micro)
        assert (np.concatenate([one.tokens, two.tokens]) == expected.tokens).all()
        assert not one.state and two.state == expected.state
        parts = [next(rank) for rank in ranks]
        assert (np.concatenate([part.tokens for part in parts]) == expected.tokens).all()
        assert all(part.state == expected.state for part in parts)
        if step == 10:  # the other way round
            ranks = [ConversationStream([dataset], BLOCK, 1, step_size=4, first=first, count=1, state=expected.state)
                     for first in (0, 1)] + ranks[1:]
            parts = [next(rank) for rank in ranks]
            expected = next(whole), next(micro), next(micro)
            assert (np.concatenate([part.tokens for part in parts]) == expected[0].tokens).all()
            ranks = [ConversationStream([dataset], BLOCK, 2, step_size=4, first=first, count=2,
                                        state=expected[0].state) for first in (0, 2)]


@pytest.mark.parametrize('change, said', [
    (dict(seed=3), 'made with seed 0, and the run has 3'),
    (dict(rows=5), 'other train_datasets, another template or other passages'),
    (dict(template='instructretro'), 'other train_datasets, another template or other passages'),
    (dict(state=dict(taken=[1], seed=0, datasets=[])), 'was trained on documents'),
])
def test_a_state_that_cannot_go_on_is_refused_by_name(tmp_path, tokenizer, dataset, change, said):
    state = change.get('state') or ConversationStream([dataset], BLOCK, 4).state()
    settings = make_settings().replace(template=change.get('template', 'plain'), block_size=2 * BLOCK)
    settings = settings if 'template' in change else make_settings()
    rows = [ask(i, 1 + i % 9) for i in range(change.get('rows', 90))]
    other = open_set(tmp_path / 'y.jsonl', rows, tokenizer, settings)
    with pytest.raises(UserError, match=said):
        ConversationStream([other], BLOCK, 4, seed=change.get('seed', 0), state=state)


def cut(tmp_path, tokenizer, row, settings=None):
    dataset = open_set(tmp_path / 'x.jsonl', [row], tokenizer, settings)
    example, = dataset.examples
    assert len(example.tokens) <= BLOCK and example.is_answer.any()
    return example, tokenizer.decode(example.tokens.tolist()), dataset.describe()[1]


def test_what_is_longer_than_the_block_loses_passages_then_turns_then_the_question_and_last_the_answers_end(
        tmp_path, tokenizer):
    asked = ask(0, 3)['messages']
    long = 'word ' * 200
    settings = make_settings(passages='prompt')
    row = dict(id='a', messages=asked, ctxs=[dict(title='one', text='first ' * 8), dict(title='two', text=long)])
    example, text, said = cut(tmp_path, tokenizer, row, settings)
    assert set(example.cuts) == {'passages'} and 'first first' in text and text.endswith('json/decoder2<|endoftext|>')
    assert "1 of 1 conversations are longer than block_size 128, such as 'a'; cut is text of passages (" in said
    row = dict(id='a', messages=[dict(role='user', content=long), dict(role='assistant', content='old'), *asked])
    example, text, said = cut(tmp_path, tokenizer, row)
    assert set(example.cuts) == {'turns'} and 'old' not in text and 'What is in' in text and 'earlier turns' in said
    row = dict(id='a', messages=[dict(role='user', content='begin ' + long + ' the end?'), asked[1]])
    example, text, said = cut(tmp_path, tokenizer, row)
    assert set(example.cuts) == {'question'} and 'begin' not in text and 'the end?\n\nAnswer: json/decoder0' in text
    row = dict(id='a', messages=[dict(role='system', content=long), *asked])
    example, text, said = cut(tmp_path, tokenizer, row)
    assert set(example.cuts) == {'system'} and text.replace('<|endoftext|>', '').startswith('Question: What')
    row = dict(id='a', messages=[asked[0], dict(role='assistant', content=long)])
    example, text, said = cut(tmp_path, tokenizer, row)
    assert set(example.cuts) == {'answer'} and len(example.tokens) == BLOCK and not text.endswith('<|endoftext|>')
    assert 'the end of the answer (' in said and 'What is in json/decoder?' in text


def test_where_an_answer_begins_behind_long_passages_does_not_tell_how_long_it_is(tmp_path, tokenizer):
    settings, passages = make_settings(passages='prompt'), [dict(title='t', text='word ' * 300)]
    starts = set()
    for words in (1, 3, 6):  # up to a quarter of the block
        row = dict(id='a', question='why?', answers=['because ' * words], ctxs=passages)
        example, _ = cut(tmp_path, tokenizer, row, settings)[:2]
        starts.add(int(example.is_answer.argmax()))
        assert set(example.cuts) == {'passages'}
    assert len(starts) == 1 and starts.pop() <= 128 * 3 // 4


def test_an_answer_that_nothing_precedes_in_the_block_is_refused(tmp_path, tokenizer):
    marks = '{system}' + 'mark ' * 140 + '{user}\nA:{assistant}'
    with pytest.raises(UserError, match='block_size 128 has no room for an answer'):
        open_set(tmp_path / 'x.jsonl', [ask(0)], tokenizer, make_settings().replace(template=marks))


def test_a_question_that_nothing_answers_is_left_out(tmp_path, tokenizer):
    asked = ask(0)['messages']
    example, = open_set(tmp_path / 'x.jsonl', [dict(messages=[*asked, asked[0]])], tokenizer).examples
    assert tokenizer.decode(example.tokens.tolist()).count('What is in') == 1


def test_passages_that_no_conversation_has_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match='no conversation of .* has ctxs'):
        open_set(tmp_path / 'x.jsonl', [dict(messages=ask(0)['messages'])], tokenizer, make_settings(passages='prompt'))


@pytest.mark.parametrize('world_size', [1, 2])
def test_held_out_conversations_are_evaluated_once_whatever_the_ranks(dataset, world_size):
    found, chunks = 0, Counter()
    for rank in range(world_size):
        batches, padding = val_conversations([dataset], BLOCK, 4, 0, rank, world_size)
        assert 0 < padding < 0.7
        for batch in batches:
            assert len(batch.tokens) == 4
            found += int((batch.targets >= 0).sum())
            chunks.update(batch.chunk_ids[batch.doc_ids != 0].tolist())
    assert found == sum(int(e.is_answer.sum()) for e in dataset.examples)
    assert set(chunks.values()) == {1} and len(chunks) == sum(len(e.chunk_ids) for e in dataset.examples)
    few, _ = val_conversations([dataset], BLOCK, 4, 300)
    assert 0 < sum((batch.doc_ids != 0).sum() for batch in few) < 300 / CHUNK * 2
