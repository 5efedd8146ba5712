"""
Scores of an answer against gold ones, of which the best counts: exact match and F1 as SQuAD has them, and ROUGE-L.

    scores('The Eiffel Tower!', ['Eiffel tower', 'Tour Eiffel'])  # {'exact_match': 1.0, 'f1': 1.0, 'rouge_l': 0.8}
"""
import re
import string
from collections import Counter

SCORES = ('exact_match', 'f1', 'rouge_l')
PUNCTUATION = str.maketrans('', '', string.punctuation)


def scores(answer, golds):
    """{name: best score from 0 to 1} of an answer, one of SCORES each."""
    return {name: max(score(answer, gold) for gold in golds)
            for name, score in zip(SCORES, (exact_match, f1, rouge_l), strict=True)}


def normalize(text):
    """SQuAD's: lower case, without punctuation in ASCII, articles, and spaces beyond one."""
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(PUNCTUATION)).split())


def exact_match(answer, gold):
    return float(normalize(answer) == normalize(gold))


def f1(answer, gold):
    """Of the normalized words, with how often each occurs. If one of the two has none: whether both have none."""
    answer, gold = normalize(answer).split(), normalize(gold).split()
    if not answer or not gold:
        return float(answer == gold)
    return harmonic_mean(sum((Counter(answer) & Counter(gold)).values()), len(answer), len(gold))


def rouge_l(answer, gold):
    """F1 of the longest common subsequence of the words, which are runs of a-z and 0-9 in lower case; 0 without any."""
    answer, gold = (re.findall('[a-z0-9]+', text.lower()) for text in (answer, gold))
    row = [0] * (len(gold) + 1)  # lengths of the longest common subsequences of the answer so far and gold[:j]
    for word in answer:
        above = row
        row = [0]
        for j, other in enumerate(gold):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return harmonic_mean(row[-1], len(answer), len(gold))


def harmonic_mean(common, answer, gold):
    """Of common / answer and common / gold; 0 if nothing is common."""
    return 2 * common / (answer + gold) if common else 0.0
