"""Things as somebody drew them: cut-outs with their names, out of a set of emoji.

The classifier run backwards (class_fields.py) makes no edges, no shadows and nothing but its own classes.
Microsoft's Fluent emoji (MIT, npm package `@lobehub/fluent-emoji-3d`) are rendered things on a clear
ground, files named by code point; what each shows is said here, in the words of object_names.py where it
has one. Faces, people, flags and signs are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from jobs.backgrounds import SIDE, clip, scenery
from jobs.object_names import kinds

# Emoji and what they show, in the order of Unicode's blocks.
_NAMES = """
☁ cloud; ☂ umbrella; ☃ snowman; ☎ telephone; ☕ cup of coffee; ⚓ anchor; ⚔ sword; ⚙ gear; ⚽ soccer ball;
⚾ baseball; ⛄ snowman; ⛏ pickaxe; ⛓ chain; ⛪ church; ⛰ mountain; ⛲ fountain; ⛵ sailboat; ⛸ ice skate;
⛺ tent; ⛽ gas pump; ✂ scissors; ✈ airplane; ✉ envelope; ✋ hand; ✌ hand; ✏ pencil; ❄ snowflake; ⌚ watch;
⌛ hourglass; ⏰ clock; ⏱ stopwatch; ☝ hand; ✊ hand; ⌨ keyboard; ☀ sun; ☄ comet; ⛑ helmet; ⭐ star; ❤ heart;
🌂 umbrella; 🌈 rainbow; 🌊 wave; 🌋 volcano; 🌍 globe; 🌙 moon; 🌭 hot dog; 🌮 taco; 🌯 burrito; 🌰 acorn;
🌱 plant; 🌲 tree; 🌳 tree; 🌴 palm tree; 🌵 cactus; 🌶 pepper; 🌷 tulip; 🌸 flower; 🌹 rose; 🌺 flower;
🌻 sunflower; 🌼 flower; 🌽 corn; 🌾 hay; 🌿 leaf; 🍀 leaf; 🍁 leaf; 🍂 leaf; 🍃 leaf; 🍄 mushroom; 🍅 tomato;
🍆 eggplant; 🍇 grapes; 🍈 melon; 🍉 watermelon; 🍊 orange; 🍋 lemon; 🍌 banana; 🍍 pineapple; 🍎 apple;
🍏 apple; 🍐 pear; 🍑 peach; 🍒 cherry; 🍓 strawberry; 🍔 hamburger; 🍕 pizza; 🍖 piece of meat;
🍗 piece of meat; 🍝 pasta; 🍞 loaf of bread; 🍟 plate of food; 🍦 ice cream; 🍨 ice cream; 🍩 doughnut;
🍪 cookie; 🍫 chocolate; 🍬 candy; 🍭 lollipop; 🍯 jar; 🍰 cake; 🍱 lunch box; 🍲 bowl of soup; 🍳 frying pan;
🍴 fork; 🍵 cup of tea; 🍶 bottle; 🍷 glass of wine; 🍸 glass; 🍹 glass; 🍺 glass of beer; 🍼 bottle;
🍽 plate of food; 🍾 bottle; 🍿 popcorn; 🎀 bow; 🎁 gift; 🎂 cake; 🎃 pumpkin; 🎄 Christmas tree; 🎈 balloon;
🎒 backpack; 🎓 graduation cap; 🎖 medal; 🎙 microphone; 🎞 film; 🎠 carousel; 🎡 Ferris wheel; 🎢 roller coaster;
🎣 fishing rod; 🎤 microphone; 🎥 camera; 🎧 headphones; 🎨 palette; 🎩 tall hat; 🎪 tent; 🎬 clapperboard;
🎮 game controller; 🎯 target; 🎰 slot machine; 🎱 ball; 🎲 dice; 🎳 bowling pin; 🎷 saxophone; 🎸 guitar;
🎹 piano; 🎺 trumpet; 🎻 violin; 🎾 tennis ball; 🎿 skis; 🏀 basketball; 🏆 trophy; 🏈 football; 🏍 motorcycle;
🏎 race car; 🏏 bat; 🏐 ball; 🏒 hockey stick; 🏓 racket; 🏔 mountain; 🏕 tent; 🏖 beach; 🏗 crane; 🏚 house; 🏛 temple;
🏝 island; 🏟 stadium; 🏠 house; 🏡 house; 🏢 building; 🏥 hospital; 🏫 school; 🏭 factory; 🏯 castle; 🏰 castle;
🏸 racket; 🏹 bow and arrow; 🏺 vase; 🐀 rat; 🐁 mouse; 🐂 bull; 🐃 buffalo; 🐄 cow; 🐅 tiger; 🐆 leopard;
🐇 rabbit; 🐈 cat; 🐉 dragon; 🐊 crocodile; 🐋 whale; 🐌 snail; 🐍 snake; 🐎 horse; 🐏 sheep; 🐐 goat; 🐑 sheep;
🐒 monkey; 🐓 rooster; 🐔 hen; 🐕 dog; 🐖 pig; 🐗 wild boar; 🐘 elephant; 🐙 octopus; 🐚 shell; 🐛 caterpillar;
🐜 ant; 🐝 bee; 🐞 ladybug; 🐟 fish; 🐠 fish; 🐡 fish; 🐢 turtle; 🐣 chick; 🐤 chick; 🐥 chick; 🐦 bird;
🐧 penguin; 🐨 koala; 🐩 dog; 🐪 camel; 🐫 camel; 🐬 dolphin; 🐭 mouse; 🐮 cow; 🐯 tiger; 🐰 rabbit; 🐱 cat;
🐲 dragon; 🐳 whale; 🐴 horse; 🐵 monkey; 🐶 dog; 🐷 pig; 🐸 frog; 🐹 hamster; 🐺 wolf; 🐻 bear; 🐼 panda;
🐿 squirrel; 👂 ear; 👃 nose; 👄 mouth; 👆 hand; 👇 hand; 👈 hand; 👉 hand; 👊 hand; 👋 hand; 👌 hand; 👍 hand;
👎 hand; 👏 hand; 👐 hand; 👑 crown; 👒 hat; 👓 glasses; 👔 necktie; 👕 T-shirt; 👖 jeans; 👗 dress; 👘 robe;
👙 bikini; 👚 blouse; 👛 purse; 👜 purse; 👝 bag; 👞 shoe; 👟 shoe; 👠 shoe; 👡 sandal; 👢 boot; 👻 ghost;
👽 alien; 💀 skull; 💄 lipstick; 💉 syringe; 💊 pill; 💍 ring; 💎 diamond; 💐 flower; 💡 light bulb; 💣 bomb;
💰 bag; 💵 banknote; 💺 seat; 💻 laptop; 💼 briefcase; 💽 disc; 💿 disc; 📀 disc; 📁 folder; 📅 calendar; 📌 pin;
📎 paper clip; 📏 ruler; 📐 ruler; 📓 book; 📔 book; 📕 book; 📗 book; 📘 book; 📙 book; 📚 book; 📜 scroll;
📞 telephone; 📠 printer; 📡 satellite dish; 📦 box; 📫 mailbox; 📮 mailbox; 📯 horn; 📰 newspaper; 📱 phone;
📷 camera; 📸 camera; 📹 camera; 📺 television; 📻 radio; 📼 cassette; 📽 projector; 🔋 battery; 🔌 plug;
🔍 magnifying glass; 🔎 magnifying glass; 🔑 key; 🔒 lock; 🔓 lock; 🔔 bell; 🔥 fire; 🔦 flashlight; 🔧 wrench;
🔨 hammer; 🔩 screw; 🔪 knife; 🔫 gun; 🔬 microscope; 🔭 telescope; 🔮 ball; 🕯 candle; 🕰 clock; 🕷 spider;
🕸 spider web; 🕹 joystick; 🖊 pen; 🖋 pen; 🖌 paintbrush; 🖍 crayon; 🖐 hand; 🖥 computer; 🖨 printer; 🖱 computer mouse;
🗂 folder; 🗃 box; 🗄 filing cabinet; 🗑 trash can; 🗝 key; 🗞 newspaper; 🗡 sword; 🗻 mountain; 🗼 tower; 🗽 statue;
🗿 statue; 🚀 rocket; 🚁 helicopter; 🚂 steam train; 🚃 train; 🚄 train; 🚅 train; 🚆 train; 🚇 train; 🚉 train;
🚊 tram; 🚋 tram; 🚌 bus; 🚍 bus; 🚎 bus; 🚐 van; 🚑 ambulance; 🚒 fire truck; 🚓 police car; 🚔 police car;
🚕 taxi; 🚖 taxi; 🚗 car; 🚘 car; 🚙 car; 🚚 truck; 🚛 truck; 🚜 tractor; 🚟 train; 🚠 cable car; 🚡 cable car;
🚢 ship; 🚤 motorboat; 🚥 traffic light; 🚦 traffic light; 🚪 door; 🚲 bicycle; 🚽 toilet; 🚿 shower; 🛁 bathtub;
🛋 couch; 🛌 bed; 🛍 bag; 🛏 bed; 🛒 shopping cart; 🛖 hut; 🛝 slide; 🛞 wheel; 🛠 hammer; 🛡 shield; 🛢 barrel;
🛥 motorboat; 🛩 airplane; 🛰 satellite; 🛳 ship; 🛴 scooter; 🛵 scooter; 🛶 canoe; 🛷 sled; 🛸 spaceship;
🛹 skateboard; 🛺 rickshaw; 🛻 truck; 🛼 roller skate; 🤖 robot; 🤘 hand; 🤙 hand; 🤚 hand; 🤛 hand; 🤜 hand;
🤞 hand; 🤟 hand; 🤲 hand; 🤝 hand; 🤿 diving mask; 🥁 drum; 🥄 spoon; 🥊 boxing glove; 🥋 robe;
🥌 curling stone; 🥎 ball; 🥏 frisbee; 🥐 croissant; 🥑 avocado; 🥒 cucumber; 🥓 piece of meat; 🥔 potato;
🥕 carrot; 🥖 loaf of bread; 🥗 salad; 🥘 frying pan; 🥚 egg; 🥛 glass of milk; 🥜 nut; 🥝 kiwi; 🥞 pancake;
🥟 dumpling; 🥣 bowl; 🥤 cup; 🥥 coconut; 🥦 broccoli; 🥧 pie; 🥨 pretzel; 🥩 piece of meat; 🥪 sandwich; 🥫 can;
🥬 cabbage; 🥭 mango; 🥮 cake; 🥯 bagel; 🥾 boot; 🥿 shoe; 🦀 crab; 🦁 lion; 🦂 scorpion; 🦃 turkey; 🦅 eagle;
🦆 duck; 🦇 bat; 🦈 shark; 🦉 owl; 🦊 fox; 🦋 butterfly; 🦌 deer; 🦍 gorilla; 🦎 lizard; 🦏 rhino; 🦐 shrimp;
🦑 squid; 🦒 giraffe; 🦓 zebra; 🦔 hedgehog; 🦕 dinosaur; 🦖 dinosaur; 🦗 grasshopper; 🦘 kangaroo; 🦙 llama;
🦚 peacock; 🦛 hippo; 🦜 parrot; 🦝 raccoon; 🦞 lobster; 🦟 mosquito; 🦡 badger; 🦢 swan; 🦣 mammoth; 🦤 bird;
🦥 sloth; 🦦 otter; 🦧 orangutan; 🦨 skunk; 🦩 flamingo; 🦪 oyster; 🦫 beaver; 🦬 bison; 🦭 seal; 🦮 dog;
🦴 bone; 🦵 leg; 🦶 foot; 🦷 tooth; 🦺 vest; 🧀 cheese; 🧁 cake; 🧃 box; 🧅 onion; 🧇 waffle; 🧈 butter;
🧊 ice cube; 🧗 climber; 🧠 brain; 🧢 cap; 🧣 scarf; 🧤 glove; 🧥 coat; 🧦 sock; 🧨 firecracker; 🧩 puzzle;
🧪 test tube; 🧭 compass; 🧮 abacus; 🧯 fire extinguisher; 🧰 tool box; 🧱 brick; 🧲 magnet; 🧳 suitcase;
🧴 bottle; 🧵 thread; 🧶 yarn; 🧷 pin; 🧸 teddy bear; 🧹 broom; 🧺 basket; 🧻 toilet paper; 🧼 soap; 🧽 sponge;
🧿 bead; 🩰 shoe; 🩱 swimsuit; 🩳 shorts; 🩴 sandal; 🩹 bandage; 🩺 stethoscope; 🪀 yo-yo; 🪁 kite; 🪂 parachute;
🪃 boomerang; 🪄 wand; 🪆 doll; 🪈 flute; 🪐 planet; 🪑 chair; 🪒 razor; 🪓 axe; 🪔 lamp; 🪕 banjo; 🪖 helmet;
🪗 accordion; 🪘 drum; 🪙 coin; 🪚 saw; 🪛 screwdriver; 🪜 ladder; 🪝 hook; 🪞 mirror; 🪟 window; 🪣 bucket;
🪤 mousetrap; 🪥 toothbrush; 🪦 gravestone; 🪨 rock; 🪰 fly; 🪱 worm; 🪲 beetle; 🪳 cockroach; 🪴 potted plant;
🪵 wood; 🪶 feather; 🪷 flower; 🪸 coral; 🪹 nest; 🪺 nest; 🪼 jellyfish; 🪿 goose; 🫎 moose; 🫏 donkey;
🫐 blueberries; 🫒 olive; 🫓 flatbread; 🫖 teapot; 🫗 glass; 🫘 beans; 🫙 jar; 🫚 ginger; 🫛 peas; 🫰 hand;
🫱 hand; 🫲 hand; 🫳 hand; 🫴 hand; 🫵 hand; 🫶 hand
"""
_KINDS = {
    "animal": """
        bull; deer; dolphin; donkey; giraffe; mammoth; moose; mouse; raccoon; rat; rhino
    """,
    "bird": "chick; turkey",
    "vehicle": "cable car; motorcycle",
    "building": "building; factory; hospital; house; hut; school; stadium",
    "landscape": "island",
}
PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SELECTOR = "\ufe0f"  # stands behind signs that may also be shown as text


class MissingDrawingsError(FileNotFoundError):
    """The folder of the emoji is not there, or not what it should be; says how to get it."""


def drawn_names() -> dict[str, str]:
    """The name of each emoji."""
    pairs = (entry.strip().partition(" ") for entry in _NAMES.split(";"))
    return {sign: name for sign, _, name in pairs}


def drawn_kinds() -> dict[str, str]:
    """What kind of thing a name is, as object_names.kinds has it, with the names that only drawn things have."""
    more = ((name.strip(), kind) for kind, members in _KINDS.items() for name in members.split(";"))
    return {**kinds(), **dict(more)}


def read_drawings(folder: Path) -> list[tuple[str, Image.Image]]:
    """Names and cut-outs (RGBA), in order of the code points; those of hands in every colour of skin.

    Raises MissingDrawingsError.
    """
    found = []
    for sign, name in sorted(drawn_names().items()):
        code = f"{ord(sign):04x}"
        files = [file for end in ("", "-fe0f") if (file := folder / f"{code}{end}.webp").is_file()]
        files += sorted(folder.glob(f"{code}-1f3f[b-f].webp"))
        if not files:
            raise MissingDrawingsError(
                f"{folder} has no picture of {sign} ({code}.webp): it should be the folder `assets` of the npm package "
                f"{PACKAGE}, which `npm pack` fetches"
            )
        found += [(name, _cropped(Image.open(file).convert("RGBA"))) for file in files]
    return found


class Scene(NamedTuple):
    """Frames (L, 224, 224, 3) uint8 of one place, without a thing and with it."""

    empty: np.ndarray
    shown: np.ndarray
    name: str


def scenes(drawings: Sequence[tuple[str, Image.Image]], random: np.random.Generator, length: int) -> Iterator[Scene]:
    """Scenes without end; every name comes equally often, whatever it has drawings of."""
    by_name: dict[str, list[Image.Image]] = {}
    for name, picture in drawings:
        by_name.setdefault(name, []).append(picture)
    names = sorted(by_name)
    while True:
        for place in random.permutation(len(names)):
            owned = by_name[names[place]]
            empty, right = (scenery(random, length), ()) if random.random() < 0.6 else clip(random, length)
            while right:
                empty, right = clip(random, length)
            shown = _placed(owned[random.integers(len(owned))], empty, random)
            yield Scene(empty, shown, names[place])


def _placed(drawing: Image.Image, behind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The drawing in front, in another light, perhaps turned or twice; it stays, drifts or comes nearer."""
    if random.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = drawing.rotate(random.normal(0, 12), Image.Resampling.BICUBIC, expand=True)
    for kind in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        drawing = _with_alpha(kind(drawing).enhance(random.uniform(0.55, 1.25)), drawing)
    if random.random() < 0.4:
        drawing = drawing.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 3)))
    size = random.uniform(0.45, 1.05) * SIDE
    grown = random.choice((0, 0, 0.1, 0.3))
    drift = random.normal(0, 0.08, 2) * (random.random() < 0.5)
    centres = [random.normal(0.5, 0.08, 2)]
    if random.random() < 0.12:
        size, centres = size * 0.6, [random.normal((x, 0.5), 0.05) for x in (0.28, 0.72)]
    frames = []
    for part, frame in zip(np.linspace(0, 1, len(behind)), behind, strict=True):
        scale = size * (1 + grown * part) / max(drawing.size)
        width, height = (max(2, round(side * scale)) for side in drawing.size)
        sized = drawing.resize((width, height), Image.Resampling.BILINEAR)
        picture = Image.fromarray(frame)
        for x, y in centres:
            corner = round((x + drift[0] * part) * SIDE - width / 2), round((y + drift[1] * part) * SIDE - height / 2)
            picture.paste(sized, corner, sized)
        frames.append(np.asarray(picture))
    return np.stack(frames)


def _with_alpha(picture: Image.Image, of: Image.Image) -> Image.Image:
    picture.putalpha(of.getchannel("A"))
    return picture


def _cropped(picture: Image.Image) -> Image.Image:
    box = picture.getchannel("A").getbbox()
    assert box is not None
    return picture.crop(box)
