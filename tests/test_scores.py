"""Exact match, F1 and ROUGE-L, beside the libraries that others compute them with."""
import random

import pytest

from evaluation.scores import SCORES, exact_match, f1, normalize, rouge_l, scores

REAL = [
    ('Denver Broncos', ['Denver Broncos', 'The Denver Broncos', 'broncos']),
    ('in the 10th and 11th centuries', ['10th and 11th centuries', 'in the 10th and 11th centuries']),
    ('It returns the day of the week.', ['Return the day of the week', 'Day of the week (0-6)']),
    ('the', ['a', 'an']), ('', ['']), ('', ['x']), ('x', ['']), ('...', ['']), (' \n', ['the']),
    ('Tour Eiffel', ['La tour Eiffel']), ('naïve café', ['Naïve Café', 'naive cafe']), ('中文 字符', ['中文字符']),
    ('“quoted”', ['"quoted"', 'quoted']), ("don't", ['dont', "DON'T"]), ('İstanbul', ['istanbul', 'i̇stanbul']),
    ('$1,000.50', ['1000.50', '100050']), ('a b a b', ['b a b a', 'a a b b']), ('x_y', ['x y', 'xy']),
    ('word\u00a0word', ['word word']), ('👩\u200d👧 family', ['family']), ('ǅ ß ẞ', ['ǆ ss', 'ß']),
]


def random_pairs(count=300):
    rng = random.Random(0)
    words = ['the', 'a', 'An', 'tower', 'Tower!', 'x', '42', '4,2', 'naïve', '中文', '—', '...', '', "it's", 'its',
             '\u00a0', '\u2028', 'ﬁ', 'é', 'e\u0301', '\t', 'The.', 'week', 'of']

    def text():
        return rng.choice([' ', ' ', '', '\n']).join(rng.choices(words, k=rng.randrange(9)))
    return [(text(), [text() for _ in range(rng.randrange(1, 6))]) for _ in range(count)]


def test_exact_match_and_f1_are_those_of_torchmetrics():
    squad = pytest.importorskip('torchmetrics.functional.text', reason='torchmetrics is not installed').squad
    for answer, golds in REAL + random_pairs():
        found = squad([dict(prediction_text=answer, id='1')],
                      [dict(answers=dict(answer_start=[0] * len(golds), text=golds), id='1')])
        ours = scores(answer, golds)
        assert ours['exact_match'] * 100 == pytest.approx(float(found['exact_match'])), (answer, golds)
        assert ours['f1'] * 100 == pytest.approx(float(found['f1']), abs=1e-4), (answer, golds)


def test_rouge_l_is_that_of_rouge_score():
    rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer', reason='rouge-score is not installed')
    scorer = rouge_scorer.RougeScorer(['rougeL'])
    for answer, golds in REAL + random_pairs():
        assert scores(answer, golds)['rouge_l'] == pytest.approx(
            scorer.score_multi(golds, answer)['rougeL'].fmeasure), (answer, golds)


def test_known_scores():
    assert normalize(' The  Eiffel-Tower, a\tTOWER ') == 'eiffeltower tower'
    assert (exact_match('The tower!', 'tower'), f1('tower', 'tower bridge'), rouge_l('b a', 'a b')) == (1, 2 / 3, 0.5)
    assert scores('no', ['yes', 'No.']) == dict(zip(SCORES, (1, 1, 1), strict=True))
    assert scores('', ['']) == dict(exact_match=1, f1=1, rouge_l=0)  # rouge-score gives nothing for nothing
