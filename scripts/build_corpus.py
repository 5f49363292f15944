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
import json
import lzma
import re
import subprocess
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

MANIFEST = Path(__file__).with_name("corpus.json")
END = "<|endoftext|>"
VOCABULARY = 16384
TOKENIZER_BYTES = 32 << 20  # of text that the tokenizer is trained on
HELD_OUT = 64  # one document in as many
SHORTEST = 400  # characters of a document
COMMON = 0.2  # a line that this share of a package's documents have is no text
# Tokens have two bytes: literals and positions are told apart by one bit.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 192 << 20, "lc": 0, "lp": 1, "pb": 1}]
SUFFIXES = (".html", ".htm", ".xhtml", ".html.en", ".txt", ".rst", ".md", ".pod", ".tex", ".info", ".py", ".c", ".h")
MANUAL_PAGE = re.compile(r"usr/share/man/man\d/[^/]+$")
SKIPPED = re.compile(
    r"/(_sources|_modules|_static|translations?|locale|i18n|search|genindex[^/]*|index-files|src-html|class-use)(/|\.html|$)"
)


class Text(HTMLParser):
    """The text of an HTML page: what a reader sees between its menus."""

    HIDDEN = frozenset(("script", "style", "head", "nav", "header", "footer", "form", "noscript", "svg"))
    INLINE = frozenset(
        ("a", "abbr", "acronym", "b", "big", "cite", "code", "dfn", "em", "font", "i", "img", "kbd", "q", "s", "samp")
        + ("small", "span", "strong", "sub", "sup", "tt", "u", "var", "wbr")
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        self.verbatim += tag == "pre"
        if tag in ("td", "th"):
            self.parts.append(" ")
        elif tag not in self.INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag not in self.INLINE and tag not in ("td", "th"):
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3", "h4") else "\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
    parser = Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


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
        if name.endswith(".tar.xz"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r|xz") as inner:
                yield from ((f"{name}/{path}", content) for path, content in files_of(inner))
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
    for path in sorted(files, key=by_name):
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the corpus of the loss curves from Debian packages.")
    parser.add_argument("--output", type=Path, default=Path("build/corpus"))
    parser.add_argument("--cache", type=Path, default=Path("build/packages"), help="where package files are kept")
    parser.add_argument("--refresh", action="store_true", help="take today's versions, and write the manifest anew")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)

    manifest = json.loads(MANIFEST.read_text())
    documents: dict[str, str] = {}
    seen: set[bytes] = set()
    for package in manifest["packages"]:
        deb = download(package, arguments.cache, arguments.refresh)
        found, copyright_text = documents_of(deb, package.get("only", ""), package.get("limit_mb", 10) * 10**6)
        kept = {}
        for path, text in found.items():
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                kept[f"{package['name']}/{path}"] = text
        documents |= kept
        made = {"documents": len(kept), "bytes": sum(len(text.encode()) for text in kept.values())}
        if arguments.refresh:
            package |= made | {"license": licenses(copyright_text)}
        for name, value in made.items():
            expect(f"{name} of {package['name']}", value, package[name])
        print(f"{package['name']:<28} {made['documents']:6,} documents {made['bytes'] / 1e6:7.2f} MB", flush=True)

    documents = {name: documents[name] for name in sorted(documents, key=by_name)}
    tokenizer = train_tokenizer(sample_of(documents, TOKENIZER_BYTES))
    (arguments.output / "tokenizer.json").write_text(f"{tokenizer.to_str(pretty=True)}\n")
    held_out = {name for name in documents if by_name(name)[-1] % HELD_OUT == 0}
    splits = {
        "train": [text for name, text in documents.items() if name not in held_out],
        "held_out": [text for name, text in documents.items() if name in held_out],
    }
    made = {"vocabulary": VOCABULARY, "end": tokenizer.token_to_id(END)}
    tokenizer_sha256 = hashlib.sha256((arguments.output / "tokenizer.json").read_bytes()).hexdigest()
    result: dict[str, Any] = {"tokenizer": {**made, "sha256": tokenizer_sha256}}
    for split, texts in splits.items():
        tokens = encode(tokenizer, texts)
        (arguments.output / f"{split}.xz").write_bytes(lzma.compress(tokens, filters=FILTERS))
        result[split] = {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(tokens) // 2,
            "sha256": hashlib.sha256(tokens).hexdigest(),
        }
        print(split, result[split], f"{(arguments.output / f'{split}.xz').stat().st_size / 2**20:.1f} MiB", flush=True)
    if arguments.refresh:
        manifest |= result
        MANIFEST.write_text(f"{json.dumps(manifest, indent=1)}\n")
    for name, value in result.items():
        expect(name, value, manifest[name])
    (arguments.output / "corpus.json").write_bytes(MANIFEST.read_bytes())


if __name__ == "__main__":
    main()
