"""Build the corpus of the loss curves: manuals and source code of Debian packages, as tokens.

    python scripts/build_corpus.py --output build/corpus

It needs a Debian system with `apt-get` and `dpkg-deb`, and `pip install tokenizers`. Everything is of Debian's section
`main`: free to use, study, change and pass on. `scripts/corpus.json` names the packages and has the SHA-256 of all that
goes in and comes out, and the script fails where something differs. `--refresh` takes the versions that the package
index has today instead, and writes the manifest anew.

What it makes, in the directory `--output`:

    train.xz, held_out.xz   tokens, uint16 in little-endian order; `<|endoftext|>` ends each document
    tokenizer.json          the byte-level BPE tokenizer (of the `tokenizers` library) that was trained on them
    corpus.json             the manifest

A document is a file of a package. HTML becomes text, lines that many documents of a package share (menus, footers) go,
and so do documents that were seen before, or are not in English. Documents lie in an order that depends on their names
alone and has no meaning; one in 64 is held out.
"""

import argparse
import gzip
import hashlib
import html
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

MANIFEST = Path(__file__).with_name("corpus.json")
END = "<|endoftext|>"
VOCABULARY = 16384
TOKENIZER_BYTES = 32 << 20  # of text that the tokenizer is trained on
HELD_OUT = 64  # one document in as many
SHORTEST = 400  # characters of a document
LIMIT_MB = 5  # of a package's text, in 10**6 bytes, where the manifest says nothing else
RAW = 5  # bytes of files that are read at most for each byte of text that is wanted
COMMON = 0.2  # a line that this share of a package's documents have is no text
# Tokens have two bytes: literals and positions are told apart by one bit.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 192 << 20, "lc": 0, "lp": 1, "pb": 1}]
HIDDEN = re.compile(
    r"<!--.*?-->|<!\w[^>]*>|<\?[^>]*>|<(script|style|head|nav|header|footer|form|noscript|svg)\b.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
TAG = re.compile(r"<(/?[a-zA-Z][a-zA-Z0-9]*)\b[^>]*>")
CELLS = frozenset(("td", "th", "/td", "/th"))
ENDS_OF_PARAGRAPHS = frozenset(("/p", "/pre", "/h1", "/h2", "/h3", "/h4"))
INLINE = frozenset(
    (
        "", "a", "abbr", "acronym", "b", "big", "cite", "code", "dfn", "em", "font", "i", "img", "kbd", "q", "s",
        "samp", "small", "span", "strong", "sub", "sup", "tt", "u", "var", "wbr",
    )
)  # fmt: skip
SUFFIXES = (".html", ".htm", ".xhtml", ".html.en", ".txt", ".rst", ".md", ".pod", ".tex", ".info", ".py", ".c", ".h")
SOURCES = re.compile(r"usr/src/[^/]+\.tar\.xz")
MANUAL_PAGE = re.compile(r"usr/share/man/man\d/[^/]+$")
SKIPPED = re.compile(
    r"/(_sources|_modules|_static|translations?|locale|i18n|search|genindex[^/]*|index-files|src-html|class-use)(/|\.html|$)"
)


def html_to_text(page: str) -> str:
    """The text of an HTML page: what a reader sees between its menus."""
    parts: list[str] = []
    verbatim = 0
    first, *rest = TAG.split(HIDDEN.sub("", page))
    for name, data in [("", first), *zip(rest[::2], rest[1::2], strict=True)]:
        tag = name.lower()
        if tag in ("pre", "/pre"):
            verbatim = max(0, verbatim + (1 if tag == "pre" else -1))
        if tag in CELLS:
            parts.append(" ")
        elif tag in ENDS_OF_PARAGRAPHS:
            parts.append("\n\n")
        elif tag.removeprefix("/") not in INLINE:
            parts.append("\n")
        text = html.unescape(data)
        parts.append(text if verbatim else re.sub(r"\s+", " ", text))
    return "".join(parts)


def tidy(text: str) -> str:
    """No spaces at the ends of lines, no runs of empty lines."""
    text = re.sub(r"[^\S\n]+\n", "\n", text.replace("\r\n", "\n").replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def is_english(text: str) -> bool:
    """Of plain characters, with the words that any English text has. (Code has `the` in its comments.)"""
    sample = text[:20000]
    if sum(character > "\x7f" for character in sample) > 0.02 * len(sample):
        return False
    return len(re.findall(r"\b(the|of|and|to|in|is|for)\b", sample)) >= len(sample) / 1000


def files_of(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files that may be documents; those of archives in the archive too."""
    for member in archive:
        name = member.name.removeprefix("./")
        if not member.isfile():
            continue
        if SOURCES.fullmatch(name):
            # Into memory: a stream cannot be read within another one.
            packed = io.BytesIO(archive.extractfile(member).read())  # type: ignore[union-attr]
            with lzma.open(packed) as content, tarfile.open(fileobj=content, mode="r|") as inner:
                yield from ((f"{name}/{path}", file) for path, file in files_of(inner))
            continue
        plain = name.removesuffix(".gz")
        wanted = plain.endswith(SUFFIXES) or MANUAL_PAGE.search(plain)
        if wanted and not SKIPPED.search(f"/{plain}") and member.size < 4 << 20:
            content = archive.extractfile(member).read()  # type: ignore[union-attr]
            yield plain, gzip.decompress(content) if name.endswith(".gz") else content


def documents_of(deb: Path, only: str, limit: int) -> tuple[dict[str, str], str]:
    """Path and text of the documents of a package, of `limit` bytes at most, and the text of its `copyright`."""
    files: dict[str, bytes] = {}
    copyright_text = ""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for path, content in _with_copyright(archive):
            if path.endswith("/copyright"):
                copyright_text = content.decode(errors="replace")
            elif re.search(only, path):
                files[path] = content
    if process.wait():
        sys.exit(f"dpkg-deb cannot read {deb}")
    chosen: dict[str, str] = {}
    unread = RAW * limit
    for path in sorted(files, key=by_name):
        unread -= len(files[path])
        if unread < 0:
            break
        text = text_of(path, files[path])
        if len(text) >= SHORTEST and is_english(text):
            limit -= len(text.encode())
            if limit < 0:
                break
            chosen[path] = text
    found = without_common_lines(chosen)
    return {path: text for path, text in found.items() if len(text) >= SHORTEST}, copyright_text


def text_of(path: str, content: bytes) -> str:
    """The text of a file; empty if it has another encoding than UTF-8."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ""
    is_html = "html" in path.rpartition("/")[2] or path.endswith(".htm")
    return tidy(html_to_text(text) if is_html else text)


def _with_copyright(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """`files_of`, and the packages' `copyright`."""
    for member in archive:
        if member.isfile() and re.fullmatch(r"\./usr/share/doc/[^/]+/copyright", member.name):
            yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]
        else:
            yield from files_of(_One(archive, member))  # type: ignore[arg-type]


class _One:
    """An archive of which one member is left to read."""

    def __init__(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.member = member
        self.extractfile = archive.extractfile

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        yield self.member


def without_common_lines(documents: dict[str, str]) -> dict[str, str]:
    if len(documents) < 10:
        return documents
    counts = Counter(line for text in documents.values() for line in {line.strip() for line in text.split("\n")})
    common = {line for line, count in counts.items() if count > max(5, COMMON * len(documents)) and len(line) > 3}
    return {
        path: tidy("\n".join(line for line in text.split("\n") if line.strip() not in common))
        for path, text in documents.items()
    }


def by_name(name: str) -> bytes:
    """An order without meaning."""
    return hashlib.sha256(name.encode()).digest()


def licenses(copyright_text: str) -> str:
    """The license names that a copyright file in Debian's machine-readable format has; else where to read."""
    names = dict.fromkeys(re.findall(r"^License:[ \t]*(\S.*)$", copyright_text, re.MULTILINE))
    shown = "; ".join(list(names)[:8])
    return shown or "free (Debian main); the package's copyright file has the text"


def download(package: dict[str, Any], cache: Path, refresh: bool) -> Path:
    """The package file, of the version that the manifest names; checked."""
    name = package["name"]
    if refresh:
        shown = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", name], capture_output=True, text=True, check=True
        )
        fields = dict(re.findall(r"^(Version|SHA256|Architecture): (.*)$", shown.stdout, re.MULTILINE))
        package |= {"version": fields["Version"], "architecture": fields["Architecture"], "sha256": fields["SHA256"]}
    version = package["version"].replace(":", "%3a")
    file = cache / f"{name}_{version}_{package['architecture']}.deb"
    if not file.exists():
        command = ["apt-get", "-qq", "-oAPT::Sandbox::User=root", "download", f"{name}={package['version']}"]
        if subprocess.run(command, cwd=cache).returncode:
            sys.exit(f"{name} {package['version']} is not in the package index: run apt-get update, or use --refresh")
    expect(f"{file.name}", hashlib.sha256(file.read_bytes()).hexdigest(), package["sha256"])
    return file


def expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        sys.exit(f"{what}: SHA-256 or count is {got}, but the manifest says {expected}")


def train_tokenizer(texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sample_of(documents: dict[str, str], size: int) -> Iterator[str]:
    for text in documents.values():
        if size <= 0:
            return
        size -= len(text)
        yield text


def encode(tokenizer: Any, texts: list[str]) -> bytes:
    end = tokenizer.token_to_id(END)
    tokens = array("H")
    for first in range(0, len(texts), 512):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + 512]):
            tokens.extend(encoding.ids)
            tokens.append(end)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def collect(packages: list[dict[str, Any]], cache: Path, refresh: bool) -> dict[str, str]:
    """The documents of all packages, by package and path, in their final order."""
    work = [
        (download(package, cache, refresh), package.get("only", ""), package.get("limit_mb", LIMIT_MB) * 10**6)
        for package in packages
    ]
    documents: dict[str, str] = {}
    seen: set[bytes] = set()
    with Pool() as pool:
        for package, (found, copyright_text) in zip(packages, pool.imap(_documents_of, work), strict=True):
            size = count = 0
            for path, text in found.items():
                content = text.encode()
                digest = hashlib.sha256(content).digest()
                if digest not in seen:
                    seen.add(digest)
                    documents[f"{package['name']}/{path}"] = text
                    size, count = size + len(content), count + 1
            made = {"documents": count, "bytes": size}
            if refresh:
                package |= made | {"license": licenses(copyright_text)}
            for name, value in made.items():
                expect(f"{name} of {package['name']}", value, package[name])
            print(f"{package['name']:<28} {count:6,} documents {size / 1e6:7.2f} MB", flush=True)
    return {name: documents[name] for name in sorted(documents, key=by_name)}


def _documents_of(work: tuple[Path, str, int]) -> tuple[dict[str, str], str]:
    return documents_of(*work)


def write(documents: dict[str, str], output: Path) -> dict[str, Any]:
    """Train the tokenizer, and write it and the tokens; what the manifest says of them."""
    tokenizer = train_tokenizer(sample_of(documents, TOKENIZER_BYTES))
    file = output / "tokenizer.json"
    file.write_text(f"{tokenizer.to_str(pretty=True)}\n")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    made: dict[str, Any] = {
        "tokenizer": {"vocabulary": VOCABULARY, "end": tokenizer.token_to_id(END), "sha256": sha256}
    }
    is_held_out = {name: by_name(name)[-1] % HELD_OUT == 0 for name in documents}
    for split, wanted in (("train", False), ("held_out", True)):
        texts = [text for name, text in documents.items() if is_held_out[name] == wanted]
        tokens = encode(tokenizer, texts)
        made[split] = {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(tokens) // 2,
            "sha256": hashlib.sha256(tokens).hexdigest(),
        }
        print(split, made[split], flush=True)
        file = output / f"{split}.xz"
        file.write_bytes(lzma.compress(tokens, format=lzma.FORMAT_XZ, filters=FILTERS))
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the corpus of the loss curves from Debian packages.")
    parser.add_argument("--output", type=Path, default=Path("build/corpus"))
    parser.add_argument("--cache", type=Path, default=Path("build/packages"), help="where package files are kept")
    parser.add_argument("--refresh", action="store_true", help="take today's versions, and write the manifest anew")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)

    manifest = json.loads(MANIFEST.read_text())
    documents = collect(manifest["packages"], arguments.cache, arguments.refresh)
    made = write(documents, arguments.output)
    if arguments.refresh:
        manifest |= made
        MANIFEST.write_text(f"{json.dumps(manifest, indent=1)}\n")
    for name, value in made.items():
        expect(name, value, manifest[name])
    (arguments.output / "corpus.json").write_bytes(MANIFEST.read_bytes())


if __name__ == "__main__":
    main()
