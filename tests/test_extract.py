"""The text of files of one's own: HTML, PDF, encodings."""
import pydoc

import pytest

from data.extract import HTML, PDF, SOURCE, TEXT, Skipped, extract


def pdf(*pages, encrypt=b''):
    """A PDF of pages, each a list of lines."""
    objects = [b'<< /Type /Catalog /Pages 2 0 R >>', b'', b'<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>',
               b'<< /Title (A  manual) >>']
    numbers = []
    for lines in pages:
        drawn = b''.join(b'(%s) Tj 0 -14 Td ' % line.encode('cp1252') for line in lines)
        content = b'BT /F1 12 Tf 72 700 Td ' + drawn + b'ET' if lines else b'100 100 200 200 re f'
        objects.append(b'<< /Length %d >>\nstream\n%s\nendstream' % (len(content), content))
        objects.append(b'<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << '
                       b'/F1 3 0 R >> >> >>' % len(objects))
        numbers.append(b'%d 0 R' % len(objects))
    objects[1] = b'<< /Type /Pages /Kids [%s] /Count %d >>' % (b' '.join(numbers), len(pages))
    data, places = b'%PDF-1.4\n', []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b'%d 0 obj\n%s\nendobj\n' % (number, content)
    table = b''.join(b'%010d 00000 n \n' % place for place in places)
    return data + b'xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R /Info 4 0 R %s >>\nstartxref\n' \
        b'%d\n%%%%EOF\n' % (len(objects) + 1, table, len(objects) + 1, encrypt, len(data))


PAGE = b"""<!doctype html><html><head><meta charset="utf-8"><title>The
  guide \xe2\x80\x93 Tool</title><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a></nav><div role="main"><h1>The guide<a class="headerlink" href="#x">\xc2\xb6</a></h1>
<p>First &amp; <b>bold</b>
   text.<br>A line.</p><p>Second<!-- not this --> paragraph.</p>
<h2>Code</h2><pre><code>def f(x):
    return  x
</code><code>f(1)</code><button>Copy</button></pre><script>alert(1)</script>
<ul><li>one<li><p>two</p></ul><p hidden>secret</p>
<table><tr><th>key</th><th>value</th></tr><tr><td>a</td><td>1</td></tr></table></div><footer>Imprint</footer></body></html>"""


def test_a_page_is_its_headings_code_lists_and_paragraphs_without_scripts_and_navigation():
    assert extract('a.html', HTML, PAGE) == ('The guide \u2013 Tool', """# The guide

First & bold text.
A line.

Second paragraph.

## Code

def f(x):
    return  x


f(1)

- one
- two

key | value
a | 1""")


def test_a_real_page_keeps_every_word_of_its_docstrings():
    import textwrap
    title, text = extract('textwrap.html', HTML, pydoc.html.page('textwrap', pydoc.html.document(textwrap)).encode())
    words = ' '.join(text.split())
    assert title == 'Python: textwrap'
    for function in (textwrap.dedent, textwrap.shorten, textwrap.TextWrapper):
        assert all(word in words for word in function.__doc__.split())
    assert '<span' not in text and '</' not in text


@pytest.mark.parametrize('html', [b'<div>' * 20_000 + b'deep' + b'</div>' * 20_000, b'deep', b'<p>deep', b'<li>deep'])
def test_no_page_is_too_odd_or_nested_too_deeply(html):
    assert extract('a.html', HTML, html)[1].endswith('deep')


def test_pages_of_a_pdf_are_joined_without_their_numbers_and_divided_words_are_mended():
    title, text = extract('a.pdf', PDF, pdf(
        ['The manual', 'It says how to man-', 'age well-known things, and a new sen-', '1'],
        ['The manual', 'tence goes on here. In 2020 - 2021', 'nothing', '2'],
        ['The manual', '2 is a number', 'of two', '3']))
    assert title == 'A manual'
    assert text == ('It says how to manage well-known things, and a new sentence goes on here. In 2020 - 2021\n'
                    'nothing\n2 is a number\nof two')


def test_a_real_pdf_is_read_as_its_words():
    """Written by matplotlib, whose figures are papers' PDFs, with fonts of its own."""
    import io

    import matplotlib
    matplotlib.use('Agg')
    from matplotlib.figure import Figure
    with matplotlib.rc_context({'pdf.fonttype': 42}):
        figure, data = Figure(), io.BytesIO()
        figure.text(0.1, 0.5, 'Näive retrieval of “words”')
        figure.savefig(data, format='pdf')
    assert extract('figure.pdf', PDF, data.getvalue()) == ('figure.pdf', 'Näive retrieval of “words”')


@pytest.mark.parametrize('data, why', [
    (pdf([]), 'PDF without text, such as a scanned one'), (b'%PDF-1.4 cut', 'broken PDF'), (b'', 'broken PDF'),
    (pdf(['secret'], encrypt=b'/ID [<%s> <%s>] /Encrypt << /Filter /Standard /V 1 /R 2 /O <%s> /U <%s> /P -4 >>' % (
        b'00' * 16, b'00' * 16, b'11' * 32, b'22' * 32)), 'encrypted PDF')])
def test_a_pdf_that_gives_no_text_says_why(data, why):
    with pytest.raises(Skipped, match=f'^{why}$'):
        extract('a.pdf', PDF, data)


@pytest.mark.parametrize('name, kind, data, encoding, text', [
    ('a.txt', TEXT, b'\xef\xbb\xbfone\r\ntwo\rthree', '', 'one\ntwo\nthree'),
    ('a.txt', TEXT, 'größer'.encode('utf-16'), '', 'größer'), ('a.txt', TEXT, 'größer'.encode('utf-32'), '', 'größer'),
    ('a.py', SOURCE, '# -*- coding: latin-1 -*-\n# größer'.encode('latin-1'), '',
     '# -*- coding: latin-1 -*-\n# größer'),
    ('a.html', HTML, b'<meta http-equiv="Content-Type" content="text/html; charset=windows-1252"><p>\x93gr\xf6\x94', '',
     '“grö”'),
    ('a.html', HTML, b'<?xml version="1.0" encoding="ISO-8859-1"?><p>\x93gr\xf6\x94', '', '“grö”'),
    ('a.html', HTML, b'<meta charset="utf-8"><h2></h2><ul><li> <li></ul><p>gr\xf6', 'latin-1', 'grö'),
    ('a.txt', TEXT, 'größer'.encode('cp1252'), 'cp1252', 'größer'),
    ('a.txt', TEXT, 'größer'.encode(), 'cp1252', 'größer')])
def test_text_is_read_as_utf8_as_it_declares_or_as_the_user_says(name, kind, data, encoding, text):
    assert extract(name, kind, data, encoding)[1] == text


@pytest.mark.parametrize('kind, data, why', [
    (TEXT, b'caf\xe9', 'not UTF-8'), (TEXT, b'coding: nonsense\n\xe9', 'not UTF-8'), (TEXT, b'a\0b', 'binary'),
    (TEXT, b'\xff\xfe\x00\xd8', 'not UTF-16, as it says'), (TEXT, b'', 'without text'), (HTML, b'<p> ', 'without text'),
    (SOURCE, b'x=1;' * 100, 'very long lines')])
def test_a_file_that_is_no_text_says_why(kind, data, why):
    with pytest.raises(Skipped, match=why):
        extract('a', kind, data)


@pytest.mark.parametrize('name, text, title', [
    ('a.md', 'some\n\n## The title ##\n\n# Another', 'The title'),
    ('a.rst', 'The title\n=========\n\ntext', 'The title'),
    ('a.txt', 'no heading', 'a.txt'), ('README', '# a comment', 'README')])
def test_the_title_is_the_first_heading_or_the_name_of_the_file(name, text, title):
    assert extract(name, TEXT, text.encode())[0] == title
