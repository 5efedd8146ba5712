"""What a collection takes, in memory and on disk, and how long to fill: by arithmetic, from a sample of its rows."""
import io

from retrieval.index import SEGMENT, build_parameters, new_index, parse_index

INSERTS = 4500  # rows/s that a local file and a server were measured to take (docs/costs.md)
MATCHES = 13.1  # bytes of the exact-match index a token


def index_bytes(kind, dimension, vector_bytes, parameters):
    """(bytes in memory, bytes on disk) of a row in the index, its vector included."""
    links = 4 * (2 * int(parameters.get('M', 16)) + 4)
    in_memory = {'IVF_SQ8': dimension + 8, 'HNSW': vector_bytes + links, 'AUTOINDEX': vector_bytes + links,
                 'HNSW_SQ': dimension + links, 'DISKANN': vector_bytes / 8,
                 'IVF_RABITQ': dimension / 8 + dimension + 16}.get(kind, vector_bytes + 8)
    return in_memory, vector_bytes + 4 * 57 if kind == 'DISKANN' else in_memory


def describe_collection(settings, chunks, dimension, plain, stored):
    """
    Lines about a collection of so many chunks, whose rows take `plain` bytes in memory and `stored` on disk beside
    their vectors.
    """
    vector_bytes = dimension * (2 if settings.retrieval_vectors == 'float16' else 4)
    kind, parameters = parse_index(new_index(settings.retrieval_index, settings.retrieval_milvus_uri))
    parameters = build_parameters(kind, chunks) | parameters
    in_memory, on_disk = index_bytes(kind, dimension, vector_bytes, parameters)

    def size(each):
        return f'{chunks * each / 1e9:,.1f} GB' if chunks * each >= 1e9 else f'{chunks * each / 1e6:,.1f} MB'
    lines = [
        f'{chunks:,} chunks of {settings.retrieval_chunk_size} tokens, {dimension} dimensions of '
        f'{settings.retrieval_vectors}',
        f'vectors: {size(vector_bytes)}',
        f'index: {kind} {" ".join(f"{key}={value}" for key, value in parameters.items())}'.rstrip()
        + f', {size(in_memory)} in memory, {size(on_disk)} on disk; one for each segment of about '
          f'{SEGMENT:,} rows',
        f'rows: {size(plain)} in memory beside the index, {size(stored + vector_bytes)} on disk with their vectors',
    ]
    if settings.retrieval_pointers:
        lines.append(f'exact-match index: {size(MATCHES * settings.retrieval_chunk_size)} on each machine, in '
                     f'{settings.retrieval_matches_dir}')
    return lines


def describe_sizes(settings, rows, vectors, chunks, rate):
    """Lines about `chunks` chunks like the sampled Rows, with their vectors (n, D); `rate` is in chunks/s."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    file = io.BytesIO()
    tokens = [line[:length] for line, length in zip(rows.tokens.tolist(), rows.length.tolist(), strict=True)]
    pq.write_table(pa.table({'document': rows.document, 'text': rows.text, 'tokens': pa.array(tokens, pa.list_(
        pa.int32()))}), file)
    stored = len(file.getvalue()) / len(rows.text) + 24  # with three numbers of 8 bytes
    plain = sum(len(text.encode()) + 4 * len(line) for text, line in zip(rows.text, tokens, strict=True)) / len(
        rows.text) + 24
    slowest = min(rate, INSERTS)
    seconds = chunks / slowest
    shown = f'{seconds:,.0f} s' if seconds < 600 else f'{seconds / 60:,.0f} min' if seconds < 36_000 else (
        f'{seconds / 3600:,.0f} h')
    lines = describe_collection(settings, chunks, vectors.shape[1], plain, stored)
    lines.append(f'time: {shown} on this machine, by a process that embeds {rate:,.0f} chunks/s'
                 + (f' and a database that takes {INSERTS:,} rows/s, the slower of the two' if rate > INSERTS else
                    '; several GPUs share that (torchrun)'))
    return '\n'.join(lines)
