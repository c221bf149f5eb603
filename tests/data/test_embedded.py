"""The English-Chinese pairs that ship with the package are what their README says."""

import re

from dragoman.data.reading import EMBEDDED_DIR, read_pairs


def test_english_chinese():
    splits = {split: read_pairs(f"embedded:tiny_en_zh/{split}") for split in ("train", "validation", "test")}
    readme = (EMBEDDED_DIR / "tiny_en_zh" / "README.md").read_text(encoding="utf-8")
    for split, pairs in splits.items():
        assert f"| `{split}.jsonl.gz` | {len(pairs):,} |" in readme
        for source, target in zip(pairs["source"], pairs["target"], strict=True):
            assert re.fullmatch(r"[\u4e00-\u9fff，]+[。？]?", target), target
            assert (source[-1], target[-1]) in ((".", "。"), ("?", "？")) or target[-1] not in "。？", source
    known = {source.lower().rstrip(".?") for source in splits["train"]["source"]}
    assert "i love you" in known
    for split in ("validation", "test"):
        assert [source for source in splits[split]["source"] if source.lower().rstrip(".?") in known] == []
    characters = set("".join(splits["train"]["target"]))
    assert set("".join(splits["test"]["target"])) <= characters
