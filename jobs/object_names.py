"""What the 1,000 classes of ImageNet are called in a sentence: some 500 everyday names.

The encoder's own classifier tells 120 breeds of dog apart; somebody who is told about a video wants to
hear "a dog". The classes are named by their number, in ImageNet's order.
"""

from __future__ import annotations

NUM_CLASSES = 1000

# "first-last name" or "number name", in order; every class once. "-": nothing that people talk about much.
_TABLE = """
0 fish; 1 goldfish; 2-4 shark; 5-6 stingray; 7 rooster; 8 hen; 9 ostrich; 10-20 bird; 21-22 eagle; 23 vulture; 24 owl;
25-29 salamander; 30-32 frog; 33-37 turtle; 38-48 lizard; 49-50 crocodile; 51 dinosaur; 52-68 snake; 69 -; 70 spider;
71 scorpion; 72-77 spider; 78 -; 79 centipede; 80-83 bird; 84 peacock; 85-86 bird; 87-90 parrot; 91-93 bird; 94
hummingbird; 95 bird; 96 toucan; 97-98 duck; 99 goose; 100 swan; 101 elephant; 102 hedgehog; 103 platypus; 104
kangaroo; 105 koala; 106 wombat; 107 jellyfish; 108 sea anemone; 109 coral; 110-111 worm; 112 shell; 113 snail; 114
slug; 115 -; 116-117 shell; 118-121 crab; 122-124 lobster; 125 crab; 126 bug; 127-129 stork; 130 flamingo; 131-133
heron; 134 crane bird; 135 heron; 136-143 bird; 144 pelican; 145 penguin; 146 seagull; 147-148 whale; 149-150 seal;
151-268 dog; 269-272 wolf; 273-275 wild dog; 276 hyena; 277-280 fox; 281-285 cat; 286 cougar; 287 lynx; 288-290
leopard; 291 lion; 292 tiger; 293 cheetah; 294-297 bear; 298 mongoose; 299 meerkat; 300 beetle; 301 ladybug; 302-307
beetle; 308 fly; 309 bee; 310 ant; 311-312 grasshopper; 313 -; 314 cockroach; 315 mantis; 316-318 bug; 319-320
dragonfly; 321-326 butterfly; 327 starfish; 328 sea urchin; 329 -; 330-332 rabbit; 333 hamster; 334 porcupine; 335
squirrel; 336 groundhog; 337 beaver; 338 guinea pig; 339 horse; 340 zebra; 341 pig; 342-343 wild boar; 344 hippo; 345
cow; 346 buffalo; 347 bison; 348-349 sheep; 350 goat; 351-353 antelope; 354 camel; 355 llama; 356-359 weasel; 360
otter; 361 skunk; 362 badger; 363 armadillo; 364 sloth; 365 orangutan; 366 gorilla; 367 chimpanzee; 368-382 monkey;
383-384 lemur; 385-386 elephant; 387 red panda; 388 panda; 389-392 fish; 393 clownfish; 394-397 fish; 398 abacus;
399-400 robe; 401 accordion; 402 guitar; 403 warship; 404 airplane; 405 airship; 406 -; 407 ambulance; 408 truck; 409
clock; 410 beehive; 411 -; 412 trash can; 413 gun; 414 backpack; 415-416 -; 417 balloon; 418 pen; 419 bandage; 420
banjo; 421 railing; 422 barbell; 423-424 -; 425 barn; 426 -; 427 barrel; 428 wheelbarrow; 429 baseball; 430
basketball; 431 cradle; 432 bassoon; 433 swimming cap; 434 towel; 435 bathtub; 436 car; 437 lighthouse; 438 -; 439
tall hat; 440 bottle; 441 glass of beer; 442 tower; 443 -; 444 bicycle; 445 bikini; 446 -; 447 binoculars; 448
birdhouse; 449 boathouse; 450 sled; 451 necktie; 452 -; 453 bookcase; 454-455 -; 456 bow and arrow; 457 bow tie;
458-459 -; 460 pier; 461 armor; 462 broom; 463 bucket; 464-465 -; 466 train; 467 -; 468 taxi; 469 pot; 470 candle; 471
cannon; 472 canoe; 473-475 -; 476 carousel; 477 tool box; 478 box; 479 wheel; 480 cash machine; 481-482 -; 483 castle;
484 sailboat; 485 -; 486 cello; 487 phone; 488 chain; 489 fence; 490 -; 491 chainsaw; 492 chest; 493 cabinet; 494
bell; 495 cabinet; 496 Christmas stocking; 497 church; 498 -; 499 knife; 500 ruins; 501 -; 502 shoe; 503 shaker; 504
mug; 505 coffee pot; 506 -; 507 lock; 508 keyboard; 509 -; 510 ship; 511 car; 512 -; 513 trumpet; 514 boot; 515 cowboy
hat; 516 cradle; 517 crane; 518 helmet; 519 crate; 520-521 -; 522 ball; 523 -; 524 armor; 525 -; 526 desk; 527
computer; 528 telephone; 529 -; 530 clock; 531 watch; 532 table; 533-536 -; 537 dog sled; 538 dome; 539-540 -; 541
drum; 542 -; 543 dumbbell; 544 pot; 545 fan; 546 guitar; 547 train; 548 television; 549 envelope; 550 coffee machine;
551 -; 552 scarf; 553 filing cabinet; 554 boat; 555 fire truck; 556 fireplace; 557 flag; 558 flute; 559 chair; 560
helmet; 561 forklift; 562 fountain; 563 pen; 564 bed; 565 train; 566 horn; 567 frying pan; 568 -; 569 garbage truck;
570 -; 571 gas pump; 572 goblet; 573 go-kart; 574 golf ball; 575 golf cart; 576 gondola; 577 -; 578 gown; 579 piano;
580 -; 581 car; 582-585 -; 586 tank; 587 hammer; 588 basket; 589 hair dryer; 590 phone; 591-592 -; 593 harmonica; 594
harp; 595 harvester; 596 axe; 597 -; 598 television; 599 honeycomb; 600 -; 601 gown; 602 -; 603 carriage; 604
hourglass; 605 music player; 606 iron; 607 pumpkin; 608 jeans; 609 jeep; 610 T-shirt; 611 puzzle; 612 rickshaw;
613-618 -; 619 lamp; 620 laptop; 621 lawn mower; 622 -; 623 knife; 624 library; 625 boat; 626 lighter; 627 car; 628
ship; 629 lipstick; 630 shoe; 631 -; 632 speaker; 633 magnifying glass; 634 -; 635 compass; 636 bag; 637 mailbox;
638-639 swimsuit; 640-641 -; 642 xylophone; 643 mask; 644-647 -; 648 cabinet; 649 standing stones; 650 microphone; 651
microwave; 652-653 -; 654 bus; 655 skirt; 656 van; 657 rocket; 658 -; 659 bowl; 660 mobile home; 661 old car; 662-663
-; 664 computer screen; 665 scooter; 666 mortar and pestle; 667 graduation cap; 668 mosque; 669 -; 670 scooter; 671
bicycle; 672 tent; 673 computer mouse; 674 -; 675 truck; 676-678 -; 679 necklace; 680 -; 681 laptop; 682 -; 683 oboe;
684-686 -; 687 organ; 688 -; 689 skirt; 690 cart; 691-692 -; 693 paddle; 694 -; 695 lock; 696 paintbrush; 697 -; 698
palace; 699 -; 700 paper towel; 701 parachute; 702 -; 703 bench; 704 parking meter; 705 train; 706 -; 707 telephone;
708-710 -; 711 perfume; 712-714 -; 715 helmet; 716 fence; 717 truck; 718 pier; 719 piggy bank; 720 -; 721 pillow; 722
ball; 723 pinwheel; 724 sailing ship; 725 jug; 726 -; 727 dome; 728 plastic bag; 729-731 -; 732 camera; 733 -; 734
police car; 735 poncho; 736 pool table; 737 bottle; 738 potted plant; 739 -; 740 drill; 741 rug; 742 printer; 743 -;
744 rocket; 745 -; 746 hockey puck; 747 -; 748 purse; 749 feather pen; 750 quilt; 751 race car; 752 racket; 753 -; 754
radio; 755 radio telescope; 756 barrel; 757 camper van; 758 fishing reel; 759 camera; 760 refrigerator; 761 remote
control; 762 -; 763-764 gun; 765 rocking chair; 766 -; 767 eraser; 768 football; 769 ruler; 770 shoe; 771 safe; 772 -;
773 salt shaker; 774 sandal; 775 skirt; 776 saxophone; 777 sword; 778 scale; 779 school bus; 780 sailing ship; 781
scoreboard; 782 computer screen; 783 -; 784 screwdriver; 785 -; 786 sewing machine; 787 shield; 788-789 -; 790 basket;
791 shopping cart; 792 shovel; 793 -; 794 curtain; 795 skier; 796 -; 797 sleeping bag; 798 ruler; 799-801 -; 802
snowmobile; 803 snowplow; 804 -; 805 soccer ball; 806 sock; 807 solar panel; 808 sombrero; 809 bowl of soup; 810
keyboard; 811 -; 812 space shuttle; 813 spatula; 814 motorboat; 815 spider web; 816 -; 817 sports car; 818-819 -; 820
steam train; 821 bridge; 822 -; 823 stethoscope; 824 scarf; 825 stone wall; 826 stopwatch; 827 stove; 828 -; 829 tram;
830 -; 831 couch; 832 temple; 833 submarine; 834 suit; 835 sundial; 836-837 sunglasses; 838 -; 839 bridge; 840 mop;
841 sweater; 842 swimsuit; 843 swing; 844 -; 845 syringe; 846 lamp; 847 tank; 848 -; 849 teapot; 850 teddy bear; 851
television; 852 tennis ball; 853 thatched roof; 854 curtain; 855 -; 856 harvester; 857 throne; 858 roof; 859 toaster;
860 -; 861 toilet; 862 torch; 863 totem pole; 864 tow truck; 865 -; 866 tractor; 867 truck; 868 tray; 869 coat; 870
tricycle; 871 sailboat; 872 tripod; 873 arch; 874 bus; 875 trombone; 876 hot tub; 877 -; 878 typewriter; 879 umbrella;
880 unicycle; 881 piano; 882 vacuum cleaner; 883 vase; 884-885 -; 886 vending machine; 887 robe; 888 bridge; 889
violin; 890 ball; 891 -; 892 clock; 893 wallet; 894 wardrobe; 895 fighter jet; 896 sink; 897 washing machine; 898
bottle; 899 jug; 900 water tower; 901 jug; 902 -; 903 wig; 904-905 -; 906 necktie; 907 bottle; 908 airplane wing; 909
wok; 910 wooden spoon; 911 -; 912 fence; 913 shipwreck; 914 sailboat; 915 yurt; 916 web page; 917 comic book; 918
crossword; 919 street sign; 920 traffic light; 921 book; 922 menu; 923 plate of food; 924 -; 925 bowl of soup; 926 -;
927 dessert; 928 ice cream; 929 popsicle; 930 loaf of bread; 931 bagel; 932 pretzel; 933 hamburger; 934 hot dog; 935
-; 936 cabbage; 937 broccoli; 938 cauliflower; 939 zucchini; 940-942 squash; 943 cucumber; 944 artichoke; 945 pepper;
946 -; 947 mushroom; 948 apple; 949 strawberry; 950 orange; 951 lemon; 952 fig; 953 pineapple; 954 banana; 955 -; 956
custard apple; 957 pomegranate; 958 hay; 959 pasta; 960-962 -; 963 pizza; 964 pie; 965 burrito; 966 glass of wine; 967
cup of coffee; 968 cup of tea; 969 -; 970 mountain; 971 bubble; 972 cliff; 973 coral reef; 974 geyser; 975 lake; 976
coast; 977-978 beach; 979 valley; 980 volcano; 981 baseball player; 982 groom; 983 diver; 984 field of flowers; 985
daisy; 986 orchid; 987 corn; 988 acorn; 989-990 -; 991-997 mushroom; 998 corn; 999 toilet paper
"""

# What something is when one cannot tell which: "an animal".
_KINDS = {
    "bird": """
        bird; crane bird; duck; eagle; flamingo; goose; hen; heron; hummingbird; ostrich; owl; parrot; peacock;
        pelican; penguin; rooster; seagull; stork; swan; toucan; vulture
    """,
    "animal": """
        antelope; armadillo; badger; bear; beaver; bison; buffalo; camel; cat; cheetah; chimpanzee; cougar; cow;
        crocodile; dinosaur; dog; elephant; fox; frog; goat; gorilla; groundhog; guinea pig; hamster; hedgehog;
        hippo; horse; hyena; kangaroo; koala; lemur; leopard; lion; lizard; llama; lynx; meerkat; mongoose; monkey;
        orangutan; otter; panda; pig; platypus; porcupine; rabbit; red panda; salamander; seal; sheep; skunk; sloth;
        snake; squirrel; tiger; turtle; weasel; wild boar; wild dog; wolf; wombat; zebra
    """,
    "vehicle": """
        ambulance; bus; camper van; car; fire truck; forklift; garbage truck; go-kart; golf cart; harvester; jeep;
        mobile home; old car; police car; race car; school bus; snowplow; sports car; steam train; taxi; tow truck;
        tractor; train; tram; truck; van
    """,
    "building": """
        barn; boathouse; castle; church; dome; library; mosque; palace; temple; tower; yurt
    """,
    "landscape": """
        beach; cliff; coast; field of flowers; lake; mountain; valley; volcano
    """,
    "musical instrument": """
        accordion; banjo; bassoon; cello; drum; flute; guitar; harmonica; harp; horn; oboe; organ; piano; saxophone;
        trombone; trumpet; violin; xylophone
    """,
}

# Small things that a classifier of pictures tells by what is behind them: it sees them in any meadow out of focus.
ELUSIVE = frozenset(
    {
        "ant",
        "bee",
        "beehive",
        "beetle",
        "bug",
        "butterfly",
        "cockroach",
        "dragonfly",
        "fly",
        "grasshopper",
        "hummingbird",
        "ladybug",
        "mantis",
        "spider",
        "worm",
    }
)

_UNCOUNTED = frozenset(
    [
        "armor",
        "barber shop",
        "binoculars",
        "broccoli",
        "cabbage",
        "cauliflower",
        "chain mail",
        "chocolate sauce",
        "coral",
        "corn",
        "dip",
        "dough",
        "eggnog",
        "hay",
        "jeans",
        "lotion",
        "makeup",
        "mashed potatoes",
        "meat loaf",
        "mortar and pestle",
        "pajamas",
        "pasta",
        "ruins",
        "standing stones",
        "sunglasses",
        "text",
        "toilet paper",
        "velvet",
        "wool",
    ]
)


def object_names() -> list[str | None]:
    """The name of every class, by its number: "dog", "glass of beer"; None for the few without one."""
    names: dict[int, str | None] = {}
    for entry in _TABLE.replace("\n", " ").split(";"):
        numbers, _, name = entry.strip().partition(" ")
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last or first) + 1):
            if number in names:
                raise ValueError(f"class {number} is named twice: {names[number]!r} and {name!r}")
            names[number] = None if name == "-" else name
    missing = [number for number in range(NUM_CLASSES) if number not in names]
    if missing or len(names) != NUM_CLASSES:
        raise ValueError(f"{len(names)} classes have a name, expected {NUM_CLASSES}; missing {missing[:10]}")
    return [names[number] for number in range(NUM_CLASSES)]


def kinds() -> dict[str, str]:
    """What kind of thing a name is, where that has a name of its own: a "cat" is an "animal"."""
    return {name.strip(): kind for kind, members in _KINDS.items() for name in members.split(";")}


def with_article(name: str) -> str:
    """`name` as a sentence wants it: "an owl", "a dog", "sunglasses"."""
    if name in _UNCOUNTED:
        return name
    silent = name.startswith(("uni", "uku"))
    return f"{'an' if name[0].lower() in 'aeiou' and not silent else 'a'} {name}"
