"""
The text of a file of one's own, whatever its kind, and its title:

    title, text = extract('guide.html', data, encoding='')

A file that holds no text, or none that can be read, is a Skipped, whose message says why.
"""
import codecs
import re
from collections import Counter
from contextlib import closing

from configurator import UserError

TEXT, SOURCE, HTML, PDF = 'text', 'source', 'html', 'pdf'
ENDINGS = {
    TEXT: '.txt .text .md .markdown .mdx .rst .adoc .asciidoc .org .tex .textile .pod .texi .texinfo',
    SOURCE: '.py .pyi .pyx .pxd .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .cs .java .kt .kts .scala .clj .cljs '
            '.groovy .go .rs .swift .zig .nim .d .v .sv .vhd .js .mjs .cjs .jsx .ts .tsx .vue .svelte '
            '.php .rb .pl .pm .lua .r .jl .hs .lhs .ml .mli .fs .fsx .erl .hrl .ex .exs .elm .lisp .el .scm .rkt .sh '
            '.bash .zsh .fish .ps1 .bat .awk .sql .proto .thrift .graphql .f .f90 .f95 .f03 .for .pas .ada .adb .ads '
            '.cob .asm .s .cmake .mk .gradle .dart .sol .tcl .vb .vim',
    HTML: '.html .htm .xhtml',
    PDF: '.pdf'}
KINDS = {ending: kind for kind, endings in ENDINGS.items() for ending in endings.split()}
MARKS = ((codecs.BOM_UTF8, 'utf-8'), (codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),
         (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))
DECLARED = re.compile(rb'(?:charset|coding|encoding)\s*[:=]\s*["\']?\s*([-\w.]+)')  # of HTML, XML, Python and Emacs
LATIN = ('iso-8859-1', 'latin-1', 'latin1', 'ascii', 'us-ascii')  # declared of what is Windows-1252, say the browsers
HEADING = re.compile(r'^#+[ \t]+(.+?)[ \t#]*$|^(?!\s)(.+)\n(?:=|-|~|\*){3,}\s*$', re.MULTILINE)  # of Markdown, of RST
DROPPED = {'script', 'style', 'noscript', 'template', 'nav', 'footer', 'iframe', 'object', 'canvas', 'svg', 'button',
           'select', 'textarea', 'head', 'annotation'}
HEADINGS = {f'h{level}': '#' * level + ' ' for level in range(1, 7)}
ITEMS = {**HEADINGS, 'li': '- ', 'tr': ''}  # what they begin with
BLOCKS = {'address', 'article', 'aside', 'blockquote', 'body', 'caption', 'center', 'dd', 'details', 'div', 'dl', 'dt',
          'fieldset', 'figcaption', 'figure', 'form', 'header', 'hr', 'li', 'main', 'ol', 'p', 'pre', 'section',
          'summary', 'table', 'tbody', 'tfoot', 'thead', 'tr', 'ul', *HEADINGS}
INVISIBLE = dict.fromkeys(map(ord, '\u00ad\u200b\ufeff'))  # where a line may break
HYPHEN = '\x02'  # PDFium's, in place of one that ends a line and of the line's end
LINE_END_HYPHEN = re.compile(f'{HYPHEN}\n?|(?<=[^\\W\\d_])[-\u2010\u00ad]\n(?=[a-z])')


class Skipped(Exception):
    """A file that gives no document; the message says why."""


def extract(name, kind, data, encoding=''):
    """
    (title, text) of a file's bytes; `encoding` is that of text which is not UTF-8 and declares no other. Without a
    title of its own a document has its file's name.
    """
    if kind == PDF:
        title, text = pdf_to_text(data)
        nothing = 'PDF without text, such as a scanned one'
    else:
        text = decode(data, encoding)
        title = heading(text) if kind == TEXT and '.' in name else ''
        if kind == HTML:
            title, text = html_to_text(text)
        nothing = 'without text'
        if kind == SOURCE and len(text) > 100 * (text.count('\n') + 1):
            raise Skipped('source with very long lines, such as minified or generated')
    if not text.strip():
        raise Skipped(nothing)
    return ' '.join(title.split())[:200] or name, text


def decode(data, encoding=''):
    """Text of bytes, with line feeds at the ends of lines: by its mark, as UTF-8, or as it declares."""
    marked = next((name for mark, name in MARKS if data.startswith(mark)), None)
    if not marked and b'\0' in data[:8192]:
        raise Skipped('binary')
    found = DECLARED.search(data[:1024])
    declared = found[1].decode('ascii', 'replace').lower() if found else ''
    if declared.startswith('utf'):  # not UTF-8, whatever it declares
        declared = ''
    declared = 'cp1252' if declared in LATIN else declared
    for candidate in filter(None, [marked] if marked else ['utf-8', declared, encoding]):
        try:
            text = data.decode(candidate)
            break
        except (UnicodeError, LookupError):
            continue
    else:
        raise Skipped(f'not {marked.upper()}, as it says' if marked else 'not UTF-8, maybe in another --encoding')
    return text.removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n').replace('\0', '')


def heading(text):
    """The first heading of Markdown or reStructuredText, if it comes early."""
    found = HEADING.search(text[:4000])
    return (found[1] or found[2]) if found else ''


def html_to_text(html):
    """(title, text) of a page: what it says, without its scripts and navigation, in Markdown's headings and lists."""
    from selectolax.lexbor import LexborHTMLParser
    page = LexborHTMLParser(html)
    title = page.css_first('head title')
    roots = page.css('main, [role=main]')
    root = roots[0] if len(roots) == 1 else page.body
    if root is None:
        return '', ''
    blocks, inline, prefix, item = [], [], '', ''  # (text, tag of an item); pieces of the next one; its beginning

    def end_block(text=None):
        nonlocal inline, prefix, item
        lines = [' '.join(line.split()) for line in ''.join(inline).split('\n')] if text is None else [text]
        inline = []
        if any(lines):
            blocks.append((prefix + '\n'.join(lines).strip('\n').rstrip(), item))
            prefix, item = '', ''

    open_nodes = [root]
    while open_nodes:  # no recursion: pages nest thousands deep
        node = open_nodes.pop()
        if isinstance(node, str):  # the end of an element
            end_block()
            if node in ITEMS:  # without text
                prefix, item = '', ''
        elif node.is_text_node:
            inline.append(re.sub(r'\s+', ' ', node.text_content or ''))
        elif not node.is_element_node or is_hidden(node):
            continue
        elif node.tag == 'br':
            inline.append('\n')
        elif node.tag == 'pre':
            end_block()
            for part in node.css(', '.join(DROPPED)):
                part.decompose()
            for line_end in node.css('br'):
                line_end.replace_with('\n')
            for another in node.css('code + code'):  # of another language
                another.insert_before('\n\n')
            end_block(node.text().replace('\xa0', ' '))
        else:
            if node.tag in BLOCKS:
                end_block()
                open_nodes.append(node.tag)
            if node.tag in ITEMS:
                prefix, item = ITEMS[node.tag], '' if node.tag in HEADINGS else node.tag
            elif node.tag in ('td', 'th') and ''.join(inline).strip():
                inline.append(' | ')
            open_nodes.extend(reversed(list(node.iter(include_text=True))))
    end_block()
    pieces, last = [], ''
    for block, item in blocks:
        pieces.append(('\n' if item and item == last else '\n\n') + block)
        last = item
    text = ''.join(pieces).strip().translate(INVISIBLE)
    first = page.css_first('h1')
    return (title.text() if title else '') or (first.text() if first else ''), text


def is_hidden(node):
    """Whether an element is no part of what a page says: also the signs beside headings that link to them."""
    if node.tag in DROPPED or 'hidden' in (attributes := node.attributes) or attributes.get('role') == 'navigation':
        return True
    return node.tag == 'a' and node.text().strip() in ('¶', '#', '§', '🔗')


def pdf_to_text(data):
    """(title, text) of a PDF: its pages one after another, words mended that are divided at the ends of lines."""
    from pypdfium2 import PdfDocument, PdfiumError
    try:
        with closing(PdfDocument(data)) as pdf:
            title = pdf.get_metadata_dict().get('Title', '')
            pages = []
            for page in pdf:
                with closing(page), closing(page.get_textpage()) as found:
                    drawn = found.get_text_bounded().replace('\r\n', '\n').replace('\0', '')
                    pages.append(drawn.replace(HYPHEN, f'{HYPHEN}\n').strip().split('\n'))
    except PdfiumError as error:
        raise Skipped('encrypted PDF' if 'password' in str(error).lower() else 'broken PDF') from error
    text = '\n'.join('\n'.join(lines) for lines in without_running_lines(pages) if any(lines))
    return title, LINE_END_HYPHEN.sub('', text)


def without_running_lines(pages):
    """Pages, lists of lines, without page numbers and titles: first or last lines that many share but for digits."""
    def shape(line):
        return re.sub(r'\d+|\b[ivxlc]+\b', '0', line.strip()) if len(line) <= 80 else ''
    for place in (0, -1):
        for _ in range(2):  # a title beside a number
            counts = Counter(shape(page[place]) for page in pages if page)
            running = {line for line, count in counts.items() if line and count >= max(3, 0.3 * len(pages))}
            pages = [(page[1:] if place == 0 else page[:-1]) if page and shape(page[place]) in running else page
                     for page in pages]
    return pages


def check_readers(kinds):
    """UserError if a package is missing that files of these kinds need."""
    for kind, module in ((HTML, 'selectolax.lexbor'), (PDF, 'pypdfium2')):
        if kind in kinds:
            try:
                __import__(module)
            except ImportError as error:
                others = ','.join(k for k in ENDINGS if k != kind)
                raise UserError(f'{kind} files need {module.partition(".")[0]} ({error}): install it, with python -m '
                                f'pip install -r requirements-documents.txt, or leave them out with --kinds={others}'
                                ) from error
