"""The report: that it is whole and escaped, and, where Chromium is, that it looks and works as it says."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from data.tokenizer import load_tokenizer
from evaluation.report import choose_passages, token_texts, tokens_as_html
from tests.conftest import ROOT, run

EVIL = '\x00\x1b[2J\u202e</pre><script>document.title = "pwned"</script><img src=x onerror="document.title=\'pwned\'">'


@pytest.fixture(scope='module')
def reported(populated, tmp_path_factory):
    """A folder with a trained model and the report of its evaluation on text that holds markup."""
    folder = tmp_path_factory.mktemp('reported') / 'run'
    shutil.copytree(populated, folder)
    run(ROOT / 'train.py', 'config.py', '--max_iters=30', '--eval_interval=15', folder=folder)
    text = (folder / 'config.py').read_text() + (EVIL + 'for line in file:\n    print(line)\n') * 20
    lines = [dict(id=f'<b>{i}</b>', text=(EVIL + text) * 2) for i in range(3)]
    (folder / 'evil.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    run('-m', 'evaluation', '--data=evil.jsonl', '--passages=30', folder=folder)
    return folder


class Parser(HTMLParser):
    """Collects tags with their attributes, and the text of passages."""

    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_is_self_contained_and_all_text_in_it_is_escaped(reported):
    page = (reported / 'out/report.html').read_text()
    parser = Parser()
    parser.feed(page)
    names = [tag for tag, _ in parser.tags]
    assert names.count('script') == 1 and 'img' not in names and names.count('b') == 1 and '&lt;b&gt;' in page
    assert not [value for _, attributes in parser.tags for key, value in attributes.items()
                if key in ('src', 'href') and not value.startswith(('#', 'data:'))]
    assert not re.search(r'url\((?!#)|@import', page)
    assert not set(page) & set('\x00\x1b\u202e') and '\u241b' in page and '\ufffd' in page
    assert names.count('svg') == 3 and '<title>nanoRETRO: out on evil.jsonl</title>' in page


def test_tints_are_the_losses_without_retrieval_less_those_with_it(prepared):
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    tokens = np.array(tokenizer.encode_ordinary('x < 1 & "é𝛑"'))
    gains = np.linspace(-3, 3, len(tokens))
    html = tokens_as_html(tokens, tokenizer, gains, np.arange(len(tokens)) == 1, strongest=2.0)
    spans = re.findall(r'<span class="([^"]*)" style="--s:([\d.]+)" data-gain="([-\d.]+)"', html)
    assert [float(gain) for _, _, gain in spans] == pytest.approx(gains, abs=1e-3)
    strengths = np.minimum(abs(gains) / 2, 1)
    assert [float(strength) for _, strength, _ in spans] == pytest.approx(strengths, abs=0.01)
    assert [kind.split()[0] for kind, _, _ in spans] == ['up' if gain > 0 else 'down' for gain in gains]
    assert ['shared' in kind for kind, _, _ in spans] == [i == 1 for i in range(len(tokens))]
    assert '&lt;' in html and '&amp;' in html and '&quot;' in html


def test_the_tokens_texts_together_are_the_text_of_them_all(prepared):
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    text = 'ünïcödé 𝛑 <tag> 中文 and plain'
    assert ''.join(token_texts(tokenizer.encode_ordinary(text), tokenizer)) == text
    cut = tokenizer.encode_ordinary('𝛑')[1:]
    assert '�' in ''.join(token_texts(cut, tokenizer))


def test_passages_are_the_most_helped_the_most_hurt_and_some_between():
    class Read:
        read = np.array([-1, *range(29)])
        hits = np.zeros((30, 2), dtype=[('score', float)])
    gains = np.random.default_rng(0).permutation(np.linspace(-1, 1, 30))
    nats = {'off': np.stack([gains, gains], 1) + 3, 'on': np.full((30, 2), 3.0)}
    chosen = choose_passages(None, nats, Read, 5)
    of = {kind: [i for k, i in chosen if k == kind] for kind in ('helped', 'hurt', 'between')}
    order = [i for i in np.argsort(-gains) if i != 0]
    assert of['helped'] == order[:5] and of['hurt'] == order[::-1][:5] and len(of['between']) == 5
    assert not set(of['between']) & {*of['helped'], *of['hurt']}


def chromium(*arguments, folder):
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if browser is None:
        pytest.skip('Chromium is not here')
    return subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
                           '--disable-background-networking', '--disable-component-update', '--disable-sync',
                           '--enable-logging=stderr', f'--user-data-dir={folder}/profile', *arguments],
                          capture_output=True, text=True, timeout=120)


LOOK = '''<script>
const buttons = [...document.querySelectorAll('.filter button')], seen = {};
for (const button of buttons) {
  button.click();
  seen[button.dataset.show] = [...document.querySelectorAll('.passage')].filter(p => p.offsetHeight > 0)
    .map(p => p.dataset.kind);
}
buttons[0].click();
const tints = [...document.querySelectorAll('.passage [data-gain].up, .passage [data-gain].down')].map(span =>
  [parseFloat(span.dataset.gain), getComputedStyle(span).backgroundColor]);
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const page = getComputedStyle(document.body).backgroundColor;
const strongest = parseFloat(document.querySelector('.legend').dataset.strongest);
const found = JSON.stringify({seen, tints, wide, page, strongest, title: document.title});
document.body.innerHTML = ''; document.body.textContent = 'FOUND' + found + 'END';
</script>'''


@pytest.mark.parametrize('options, page', [(['--window-size=1200,900'], 'rgb(246, 247, 249)'),
                                           (['--window-size=500,900', '--blink-settings=preferredColorScheme=0'],
                                            'rgb(15, 18, 22)')])
def test_in_a_browser_the_page_opens_without_an_error_filters_and_is_tinted_by_its_numbers(reported, tmp_path, options,
                                                                                          page):
    (tmp_path / 'page.html').write_text((reported / 'out/report.html').read_text().replace('</body>', LOOK + '</body>'))
    answer = chromium('--dump-dom', *options, f'file://{tmp_path}/page.html', folder=tmp_path)
    assert 'CONSOLE' not in answer.stderr, answer.stderr
    found = json.loads(re.search('FOUND(.*)END', answer.stdout, re.DOTALL).group(1).replace('&lt;', '<')
                       .replace('&gt;', '>').replace('&amp;', '&'))
    assert found['title'] == 'nanoRETRO: out on evil.jsonl'  # no script of the documents ran
    assert not found['wide'] and found['page'] == page
    assert len(found['seen']['all']) >= 8 and set(found['seen']['helped']) == {'helped'}
    assert set(found['seen']['hurt']) == {'hurt'} and set(found['seen']['between']) == {'between'}
    assert len(found['tints']) > 50
    for gain, color in found['tints']:
        red, green, _, *alpha = map(float, re.findall(r'[\d.]+', color))
        assert (green > red) == (gain > 0) or (alpha and alpha[0] == 0)
        strength = min(1, abs(gain) / found['strongest'])
        assert (alpha[0] if alpha else 1.0) == pytest.approx(0.75 * strength, abs=0.01)
