from __future__ import annotations

import copy
import json
import re
from functools import cache

import pytest
from golden_files import FRAMES, read_json, template, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from actors.dialogue import FRAME_TEXT, IGNORED, DialogueWriter, Rendered, Template, collate
from actors.turns import Assistant, DialogueError, Stream, System, User, parse

SYSTEM = (
    "A multimodal AI assistant is helping users with some activities. Below is their conversation, "
    "interleaved with the list of video frames received by the assistant."
)
KINDS = [(name, version) for name in ("tiny", "smollm2") for version in ("live1", "live1plus")]

# Findings 1.1 to 1.6, where the reference raises or is wrong; each has a test of its own below.
IDS_DIFFER = {"v_placeholder_in_text", "eos_in_text"}
REFUSED = {"learn_int_over", "learn_int_minus1", "two_systems"}
LABELS_DIFFER = {"frames_zero_learn_true", "frames_zero_learn_false", "frames_zero_middle"}


def cases() -> list[tuple[str, str, str]]:
    return [
        (name, version, case)
        for name, version in KINDS
        for case in read_json(f"chat/{name}_{version}.json")["cases"]
        if case not in REFUSED
    ]


def golden_labels(case: dict, version: str) -> list[int] | None:
    """The reference's labels; for live1 with its last range corrected (finding 1.1). None where it raised."""
    corrected = "labels_if_last_range_were_bracket_newline" if version == "live1" else "labels"
    labels = case.get(corrected, case.get("labels"))
    return labels if isinstance(labels, list) else None


def spelled(kind: Template, ids: list[int]) -> str:
    return kind.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def learned_text(rendered: Rendered, kind: Template) -> str:
    return spelled(kind, [label for label in rendered.labels if label != IGNORED])


@pytest.mark.parametrize(("name", "version", "case"), cases())
def test_ids_text_and_labels_equal_the_reference(name: str, version: str, case: str) -> None:
    golden = read_json(f"chat/{name}_{version}.json")["cases"][case]
    kind = template(name, version)
    rendered = kind.render(golden["conversation"])
    assert rendered.text == golden["text"]
    labels = golden_labels(golden, version)
    if case in IDS_DIFFER:
        assert rendered.input_ids != golden["input_ids"]
        return
    assert rendered.input_ids == golden["input_ids"]
    assert rendered.num_frames == golden["num_frames"]
    if case not in LABELS_DIFFER and labels is not None:
        assert rendered.labels == labels
        if version == "live1plus":
            assert learned_text(rendered, kind) == "".join(golden["learned_substrings"])


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_only_cases_in_which_the_reference_raises_go_without_its_labels(name: str, version: str) -> None:
    golden = read_json(f"chat/{name}_{version}.json")["cases"]
    raised = {case for case, values in golden.items() if golden_labels(values, version) is None}
    assert raised - LABELS_DIFFER == {
        "system_then_assistant",
        "consecutive_assistants",
        "no_system_user_first",
        "two_systems",
    }


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_special_ids_are_those_of_the_reference(name: str, version: str) -> None:
    config = read_json(f"chat/{name}_{version}.json")["config"]
    kind = template(name, version)
    assert kind.frame_id == config["v_placeholder_id"]
    assert kind.eos_id == config["eos_token_id"]
    assert kind.bos_ids == [config["bos_token_id"]]
    assert kind.frames.num_tokens == config["frame_num_tokens"]
    assert kind.silence_id == (config["frame_token_interval_id"] or config["eos_token_id"])


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_prompts_equal_the_reference(name: str, version: str) -> None:
    prompts = read_json(f"chat/{name}_{version}.json")["prompts"]
    kind = template(name, version)
    num_tokens = kind.frames.num_tokens

    writer = kind.writer()
    ids = writer.system(SYSTEM)
    ids += writer.frame()
    assert ids[:-num_tokens] == prompts["start"]["input_ids"]

    in_stream, answering = writer.copy(), writer.copy()
    assert in_stream.speak() == prompts["added_stream_generation"]["input_ids"]
    answering.speak()
    assert answering.close() == [kind.eos_id]
    assert answering.frame()[:-num_tokens] == prompts["added_stream_prompt"]["input_ids"]

    assert writer.copy().user("What is happening now?") == prompts["stream_query"]["input_ids"]
    assert writer.copy().user("") == prompts["stream_query_empty"]["input_ids"]

    for prompt in ("eval_coin", "eval_text_only", "eval_user_last_after_stream"):
        rendered = kind.render(prompts[prompt]["conversation"], prompt=True)
        assert rendered.input_ids == prompts[prompt]["input_ids"]
        assert rendered.text == prompts[prompt]["text"]


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_padded_batch_equals_the_reference(name: str) -> None:
    system = {"role": "system", "content": SYSTEM}
    conversations = {
        "live1": [
            [
                system,
                {"role": "user", "content": "Hi, who are you?"},
                {"role": "assistant", "content": "I am your video assistant.", "learn": True},
            ],
            [
                system,
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello.", "learn": True},
                {"role": "user", "content": "Thanks!"},
                {"role": "assistant", "content": "You are welcome.", "learn": True},
            ],
            [
                system,
                {"role": "stream", "num_frames": 2},
                {"role": "user", "content": "Hi"},
                {"role": "user", "content": "What am I doing?"},
                {"role": "assistant", "content": "You stir the soup, then taste it.", "learn": True},
            ],
        ],
        "live1plus": [
            read_json(f"chat/{name}_live1plus.json")["cases"]["narration_two_turns"]["conversation"],
            read_json(f"chat/{name}_live1plus.json")["cases"]["unit_test_of_reference"]["conversation"],
            [
                system,
                {"role": "user", "content": "What is happening now?"},
                {"role": "stream", "num_frames": 2, "learn": True},
                {"role": "assistant", "content": "You open the fridge.", "learn": True},
            ],
        ],
    }
    for version, dialogues in conversations.items():
        golden = read_json(f"chat/{name}_{version}.json")["batch"]
        kind = template(name, version)
        rendered = [kind.render(dialogue) for dialogue in dialogues]
        assert [r.text for r in rendered] == golden["texts"]
        batch = collate(rendered, pad_id=kind.eos_id)
        assert batch.input_ids.tolist() == golden["input_ids"]
        assert batch.attention_mask.tolist() == golden["attention_mask"]
        assert batch.labels.tolist() == golden["labels"]
        assert batch.at_frame.sum() == sum(r.num_frames for r in rendered)
        assert (batch.input_ids[batch.at_frame] == kind.frame_id).all()


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_live1_learns_exactly_the_bracket_and_newline_after_the_last_frame(name: str) -> None:
    kind = template(name, "live1")
    rendered = kind.render([System(content="s."), Stream(num_frames=2, learn=True), User(content="Hi")])
    assert learned_text(rendered, kind) == f"{kind.eos_text}]\n"


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_zero_frame_streams_are_as_if_they_were_not_there(name: str, version: str) -> None:
    kind = template(name, version)
    for learn in (True, False, 0):
        nothing = Stream(num_frames=0, learn=learn)
        turns = [
            System(content="s."),
            Stream(num_frames=2, learn=True),
            Assistant(content="Hello.", learn=True),
            User(content="Hi"),
            Assistant(content="Hello again.", learn=True),
        ]
        for place in range(1, len(turns) + 1):
            assert kind.render([*turns[:place], nothing, *turns[place:]]) == kind.render(turns)


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_an_answer_may_follow_another_or_the_system_prompt(name: str, version: str) -> None:
    kind = template(name, version)
    answer = Assistant(content="Hello.", learn=True)
    rendered = kind.render([System(content="s."), answer, answer])
    assert rendered.text == f"{kind.bos_text}s.\n\nAssistant: Hello.{kind.eos_text}\nAssistant: Hello.{kind.eos_text}"
    assert learned_text(rendered, kind) == 2 * f"Assistant: Hello.{kind.eos_text}"


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_a_stream_that_another_follows_learns_silence_at_its_last_frame(name: str, version: str) -> None:
    kind = template(name, version)
    rendered = kind.render([System(content="s."), Stream(num_frames=2, learn=True), Stream(num_frames=2, learn=True)])
    decisions = [label for label, at in zip(rendered.labels, rendered.at_frame, strict=True) if at]
    assert decisions[:3] == 3 * [kind.silence_id]
    assert spelled(kind, decisions[3:]).startswith("]")
    assert [label for label in rendered.labels if label != IGNORED] == decisions
    frame = (FRAME_TEXT * kind.frames.num_tokens + kind.frames.separator) * 2
    assert rendered.text.endswith(f"[{frame.removesuffix(',')}]\n[{frame.removesuffix(',')}]")


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_a_dialogue_without_system_prompt_is_labelled(name: str, version: str) -> None:
    kind = template(name, version)
    rendered = kind.render([Stream(num_frames=1, learn=True), Assistant(content="Hello.", learn=True)])
    assert rendered.text.startswith("\n[<v>")
    assert learned_text(rendered, kind) == f"]\nAssistant: Hello.{kind.eos_text}"


def test_a_later_system_turn_is_refused() -> None:
    with pytest.raises(DialogueError, match="turn 1 is a system turn"):
        template("tiny", "live1").render([System(content="a."), System(content="b.")])


@pytest.mark.parametrize("learn", [-1, 4, 9])
def test_learning_other_frames_than_there_are_is_refused(learn: int) -> None:
    with pytest.raises(DialogueError, match=f"learn is {learn}, expected true, false or a number from 0 to 3"):
        template("tiny", "live1").render([{"role": "stream", "num_frames": 3, "learn": learn}])


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "narrator", "content": "x"}, "turn 0: .*narrator"),
        ({"content": "x"}, "turn 0: .*role"),
        ({"role": "user", "content": "x", "learn": True}, "turn 0.user.learn: Extra inputs"),
        ({"role": "stream", "num_frames": -1}, "turn 0.stream.num_frames"),
        ({"role": "stream", "num_frames": 2, "learn": "all"}, "turn 0.stream.learn"),
        ({"role": "assistant", "content": "x", "learn": 1}, "turn 0.assistant.learn"),
    ],
)
def test_what_is_no_turn_is_refused_by_name(turn: dict, message: str) -> None:
    with pytest.raises(DialogueError, match=message):
        parse([turn])


@pytest.mark.parametrize(("name", "version"), KINDS)
@pytest.mark.parametrize("where", ["system", "user", "assistant"])
def test_no_text_becomes_a_control_token(name: str, version: str, where: str) -> None:
    kind = template(name, version)
    specials = [token.content for token in kind.tokenizer.added_tokens_decoder.values() if token.special]
    said = "a ".join([*specials, FRAME_TEXT, *specials])
    text = {"system": "s.", "user": "u?", "assistant": "a.", where: said}
    turns = [
        System(content=text["system"]),
        Stream(num_frames=2, learn=True),
        User(content=text["user"]),
        Assistant(content=text["assistant"], learn=True),
    ]
    ids = kind.render(turns).input_ids
    assert ids.count(kind.frame_id) == 2 * kind.frames.num_tokens
    assert [i for i in ids if i in kind.plain.control_ids] == [*kind.bos_ids, kind.eos_id]
    assert said in kind.decode(ids)


@pytest.mark.parametrize(("name", "version"), KINDS)
def test_the_literal_frame_placeholder_is_learned_as_it_is_written(name: str, version: str) -> None:
    kind = template(name, version)
    for content in (f"The token {FRAME_TEXT} is special.", f"before {kind.eos_text} after."):
        rendered = kind.render([System(content="s."), User(content="?"), Assistant(content=content, learn=True)])
        labels = [label for label in rendered.labels if label != IGNORED]
        assert kind.decode(labels) == f"Assistant: {content}"
        assert labels.count(kind.eos_id) == 1


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_a_learned_frame_before_a_user_turn_learns_to_end_the_stream(name: str) -> None:
    # Finding 1.10, as the reference does: converters choose what such a stream learns.
    kind = template(name, "live1plus")
    rendered = kind.render([System(content="s."), Stream(num_frames=2, learn=True), User(content="Hi")])
    assert learned_text(rendered, kind) == ",]\n"


def test_positions_know_their_turn_and_their_answer() -> None:
    kind = template("tiny", "live1plus")
    turns = [
        System(content="s."),
        Stream(num_frames=2),
        User(content="What now?"),
        Assistant(content="You cut.", learn=True),
    ]
    rendered = kind.render(turns)
    assert rendered.turns == turns
    by_turn = [
        spelled(kind, [i for i, of in zip(rendered.input_ids, rendered.turn_of, strict=True) if of == t and i < 1024])
        for t in range(4)
    ]
    assert by_turn == [f"{kind.bos_text}s.\n\n", "[,]\n", "User: What now?\n", f"Assistant: You cut.{kind.eos_text}"]
    answer = [i for i, inside in zip(rendered.input_ids, rendered.in_answer, strict=True) if inside]
    assert spelled(kind, answer) == f" You cut.{kind.eos_text}"


def test_a_writer_refuses_what_would_break_the_context() -> None:
    writer = template("tiny", "live1plus").writer()
    writer.system("s.")
    with pytest.raises(DialogueError, match="system prompt"):
        writer.system("again")
    with pytest.raises(DialogueError, match="no answer is open"):
        writer.close()
    with pytest.raises(DialogueError, match="no answer is open"):
        writer.answer("x")
    writer.speak()
    for write in (writer.frame, writer.speak, lambda: writer.user("?")):
        with pytest.raises(DialogueError, match="close"):
            write()
    writer.close()
    with pytest.raises(DialogueError, match="system prompt"):
        writer.system("again")


def test_copies_of_a_writer_go_on_independently() -> None:
    kind = template("smollm2", "live1plus")
    writer = kind.writer()
    writer.system("s.")
    other = writer.copy()
    asked = other.user("Hi")
    frame = writer.frame()
    assert asked[-3:] != frame[-3:]
    assert other.close() == [kind.eos_id]
    assert writer.frame()[0] == kind.separator_ids[0]


# Other tokenizers: a SentencePiece style of old (a normalizer prepends a space) and new form, one
# without bos, one that adds a space to the first word, and one whose vocabulary holds its own specials.
CORPUS = [
    *("A multimodal AI assistant is helping users.", "User: What now, then?", "Assistant: You cut the onion."),
    *("[,]", "User: Hi", "Assistant: You look around, and wash a bowl."),
] * 20
SPECIALS = ["<unk>", "<s>", "</s>"]


def sentencepiece_style(metaspace: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    vocabulary = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=vocabulary))
    trained = json.loads(backend.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in SPECIALS]
    backend = Tokenizer.from_str(json.dumps(trained))  # bytes are ordinary pieces, as in Llama-2
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(add_prefix_space: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|im_end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def unigram_with_specials_in_its_vocabulary() -> PreTrainedTokenizerFast:
    letters = sorted({*"\n", *"".join(CORPUS)} - {" "})
    pieces = [(special, 0.0) for special in SPECIALS] + [("▁", -3.0)] + [(letter, -4.0) for letter in letters]
    backend = Tokenizer(models.Unigram([*pieces, *((c, -5.0) for c in "<>/|_")], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


OTHER_TOKENIZERS = {
    "sentencepiece": lambda: sentencepiece_style(metaspace=False),
    "metaspace": lambda: sentencepiece_style(metaspace=True),
    "without_bos": lambda: byte_level(add_prefix_space=False),
    "prefix_space": lambda: byte_level(add_prefix_space=True),
    "unigram": unigram_with_specials_in_its_vocabulary,
}


@pytest.mark.parametrize("version", ["live1", "live1plus"])
@pytest.mark.parametrize("kind_of", OTHER_TOKENIZERS)
def test_any_tokenizer_writes_the_dialogue_and_nothing_else(kind_of: str, version: str) -> None:
    kind = Template(OTHER_TOKENIZERS[kind_of](), FRAMES[version])
    turns = [
        System(content="A multimodal AI assistant."),
        Stream(num_frames=2, learn=True),
        User(content="What now?"),
        Assistant(content="You cut the onion.", learn=True),
        Stream(num_frames=2, learn=True),
        Assistant(content="You see </s> and <s>.", learn=True),
    ]
    rendered = kind.render(turns)
    separator = kind.frames.separator
    assert kind.decode(rendered.input_ids) == (
        f"A multimodal AI assistant.\n\n[{separator}]\nUser: What now?\nAssistant: You cut the onion.\n[{separator}]\n"
        "Assistant: You see </s> and <s>."
    )
    assert [i for i in rendered.input_ids if i in kind.plain.control_ids] == [*kind.bos_ids, kind.eos_id, kind.eos_id]
    assert rendered.input_ids.count(kind.frame_id) == 4 * kind.frames.num_tokens
    learned = [label for label in rendered.labels if label != IGNORED]
    assert kind.decode(learned) == (
        f"{separator}]\nAssistant: You cut the onion.{separator}]\nAssistant: You see </s> and <s>."
    )
    assert rendered.text.count(FRAME_TEXT) == 4 * kind.frames.num_tokens


def test_a_tokenizer_without_eos_is_refused() -> None:
    backend = byte_level(False).backend_tokenizer
    with pytest.raises(DialogueError, match="no eos token"):
        Template(PreTrainedTokenizerFast(tokenizer_object=backend), FRAMES["live1"])


def test_a_separator_of_several_tokens_is_refused() -> None:
    frames = FRAMES["live1plus"].model_copy(update={"separator": "<next frame>"})
    with pytest.raises(DialogueError, match=r"separator '<next frame>' is .* tokens .*, expected one"):
        Template(tokenizer("tiny"), frames)


def test_a_tokenizer_of_a_larger_llm_is_refused() -> None:
    with pytest.raises(DialogueError, match="1024 embeddings"):
        Template(tokenizer("smollm2"), FRAMES["live1"], vocab_size=1024)


def test_the_placeholder_lies_outside_the_embeddings_of_the_llm() -> None:
    kind = Template(tokenizer("tiny"), FRAMES["live1"], vocab_size=1088)
    assert kind.writer().frame()[-1] == 1088
    assert kind.decode([1088, *kind.separator_ids]) == ""


def test_decoding_keeps_the_leading_space_and_drops_control_tokens() -> None:
    kind = template("tiny", "live1plus")
    ids = [token.id for token in kind.plain.encode(" You cut.")]
    assert kind.decode([*kind.bos_ids, kind.frame_id, *ids, kind.eos_id]) == " You cut."


FRAGMENTS = (
    "You", " cut", " the onion", ".", "?", "!", ",", "[", "]", "]\n", "\n", "\n\n", " ", "  ", ":", "12", "é", "你好",
    "😀", "User:", "Assistant:",
    "<v>", "<|eot_id|>", "<|begin_of_text|>", "<|im_end|>", "<|im_start|>", "\r\n", "\t", "'s",
)  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    num_frames = draw(st.integers(0, 4))
    return Stream(num_frames=num_frames, learn=draw(st.booleans() | st.integers(0, num_frames)))


turns_of_a_dialogue = st.lists(
    st.builds(User, content=texts) | st.builds(Assistant, content=texts, learn=st.booleans()) | streams(), max_size=8
)
dialogues = st.one_of(
    turns_of_a_dialogue,
    st.tuples(st.builds(System, content=texts), turns_of_a_dialogue).map(lambda parts: [parts[0], *parts[1]]),
)


@cache
def with_placeholder(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that reads the frame placeholder in text, as the reference's does."""
    reader = copy.deepcopy(tokenizer(name))
    reader.add_special_tokens({"additional_special_tokens": [FRAME_TEXT]})
    return reader


def write_live(writer: DialogueWriter, turns: list) -> list[int]:
    """A dialogue as a live session writes it: every user turn that is answered ends at the generation point."""
    ids: list[int] = []
    question: str | None = None
    for turn, follower in zip(turns, [*turns[1:], None], strict=False):
        if isinstance(turn, System):
            ids += writer.system(turn.content)
        elif isinstance(turn, User) and isinstance(follower, Assistant):
            question = turn.content
        elif isinstance(turn, User):
            writer.ask(turn.content)
        elif isinstance(turn, Assistant):
            ids += writer.speak() if question is None else writer.user(question)
            ids += [token.id for token in writer.template.plain.encode(" " + turn.content)]
            ids += writer.close()
            question = None
        else:
            for _ in range(turn.num_frames):
                ids += writer.frame()
    return ids + writer.rest()


def without_adjacent_streams(turns: list) -> list:
    """A live session has no two streams in a row: its frames are one."""
    turns = [turn for turn in turns if not isinstance(turn, Stream) or turn.num_frames]
    return [
        turn
        for turn, before in zip(turns, [None, *turns], strict=False)
        if not (isinstance(turn, Stream) and isinstance(before, Stream))
    ]


@pytest.mark.parametrize(("name", "version"), KINDS)
@settings(max_examples=60, deadline=None)
@given(dialogues)
def test_live_ids_equal_rendered_ids(name: str, version: str, turns: list) -> None:
    kind = template(name, version)
    turns = without_adjacent_streams(turns)
    assert write_live(kind.writer(), turns) == kind.render(turns).input_ids


@pytest.mark.parametrize(("name", "version"), KINDS)
@settings(max_examples=60, deadline=None)
@given(dialogues)
def test_ids_are_those_of_the_whole_text(name: str, version: str, turns: list) -> None:
    kind = template(name, version)
    turns = [turn for turn in turns if isinstance(turn, Stream) or not re.search(r"<\||<v>", turn.content)]
    rendered = kind.render(turns)
    assert rendered.input_ids == with_placeholder(name).encode(rendered.text, add_special_tokens=False)


@pytest.mark.parametrize(("name", "version"), KINDS)
@settings(max_examples=60, deadline=None)
@given(dialogues)
def test_control_tokens_stand_where_the_writer_put_them(name: str, version: str, turns: list) -> None:
    kind = template(name, version)
    rendered = kind.render(turns)
    answers = [turn for turn in turns if isinstance(turn, Assistant)]
    num_frames = sum(turn.num_frames for turn in turns if isinstance(turn, Stream))
    has_system = bool(turns) and isinstance(turns[0], System)
    controls = [i for i in rendered.input_ids if i in kind.plain.control_ids]
    assert controls == (kind.bos_ids if has_system else []) + len(answers) * [kind.eos_id]
    assert rendered.input_ids.count(kind.frame_id) == num_frames * kind.frames.num_tokens
    assert sum(rendered.at_frame) == num_frames == rendered.num_frames
    lists = (rendered.labels, rendered.at_frame, rendered.in_answer, rendered.turn_of)
    assert {len(values) for values in lists} == {len(rendered.input_ids)}


@pytest.mark.parametrize(("name", "version"), KINDS)
@settings(max_examples=60, deadline=None)
@given(dialogues)
def test_labels_are_the_learned_turns_and_nothing_else(name: str, version: str, turns: list) -> None:
    kind = template(name, version)
    rendered = kind.render(turns)
    for position, label in enumerate(rendered.labels):
        follower = rendered.input_ids[position + 1] if position + 1 < len(rendered.labels) else None
        assert label in (IGNORED, follower) or (rendered.at_frame[position] and label == kind.silence_id)
    for index, turn in enumerate(rendered.turns):
        positions = [i for i, of in enumerate(rendered.turn_of) if of == index]
        if isinstance(turn, Stream):
            decisions = [rendered.labels[i] for i in positions if rendered.at_frame[i]]
            assert [label != IGNORED for label in decisions] == [k < turn.num_learned for k in range(turn.num_frames)]
            silent = [label == kind.silence_id for label in decisions[:-1]]
            assert silent == [k < turn.num_learned for k in range(turn.num_frames - 1)]
        elif isinstance(turn, Assistant) and turn.learn:
            targets = [rendered.labels[i - 1] for i in positions if rendered.labels[i - 1] == rendered.input_ids[i]]
            assert kind.decode(targets).removeprefix("\n") == f"Assistant: {turn.content}"
        else:
            inside = [i for i in positions if i and rendered.input_ids[i] not in kind.separator_ids]
            learned = [rendered.labels[i - 1] for i in inside if rendered.labels[i - 1] != IGNORED]
            assert kind.decode(learned) in ("", "\n")
