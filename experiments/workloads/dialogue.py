"""A conversation. Its history is the memory, and grows turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from experiments.workloads.base import Cell, Workload
from kvmem.cache import Message
from kvmem.errors import ConfigError, PromptError
from kvmem.prompt import PromptTemplate

Exchange = tuple[str, str]
"""A user's message, and the assistant's answer."""

TRIP: tuple[Exchange, ...] = (
    (
        "Hello! My sister and I want to travel by train from Hamburg to Lisbon in May. We have twelve days and "
        "about 1,800 euros for both of us. Is that possible?",
        "Yes, it is. The ride takes three long days each way if you go straight through, so I would take the "
        "train one way and fly back. That leaves you eight days for stops and for Lisbon. With 1,800 euros for "
        "two, count on 700 for trains and the flight, 800 for beds, and 300 for food and museums, which is tight "
        "but works in May.",
    ),
    (
        "Flying back is fine. Which towns would you stop in on the way? We like old markets and dislike big crowds.",
        "Then I would leave out Paris but for the change of stations, and stop in Bordeaux, San Sebastián and "
        "Salamanca. Bordeaux has the Capucins market, best before ten in the morning. San Sebastián has La "
        "Bretxa, and the old town is quiet on weekdays in May. Salamanca lives from its students, and its market "
        "hall stands behind the main square.",
    ),
    (
        "My sister can't eat anything with nuts. Will that be a problem in Spain?",
        "It needs some care, no more. Spanish menus must list allergens, and nuts are one of them: look for "
        "'frutos de cáscara'. Take care with romesco sauce and with many desserts, which hold almonds. Plain "
        "grilled fish and tortilla are safe as a rule. I would carry a small card in Spanish and Portuguese that "
        "names the allergy.",
    ),
    (
        "Good idea. How do we get from Bordeaux to San Sebastián? I heard that the trains don't go through.",
        "That is right, you change at the border. A fast train runs from Bordeaux to Hendaye in about two and a "
        "half hours. There you walk across the station square to the narrow-gauge Euskotren, which goes every "
        "half hour and takes 37 minutes to San Sebastián's Amara station. You buy that ticket on the spot; it "
        "costs under three euros.",
    ),
    (
        "And from Salamanca into Portugal? I can't find any train at all.",
        "There is none any more that is of use. The night train was given up, and the line by Vilar Formoso has "
        "no connection on the Spanish side. A coach goes from Salamanca to Porto in about six hours, once a day "
        "around noon. From Porto to Lisbon you have the Alfa Pendular again, three hours, with a view of the "
        "river when you leave.",
    ),
    (
        "Then let us add a night in Porto. Where should we sleep there if we want it quiet but can walk to the river?",
        "I would look in Miragaia, west of the centre. It lies between the Crystal Palace gardens and the Douro, "
        "ten minutes on foot from the Ribeira and far from its bars. Small guesthouses there ask 70 to 90 euros "
        "for a double room in May. Mind that the streets are steep: with heavy cases take the tram along the "
        "river to the Alfândega stop.",
    ),
    (
        "We each have one backpack, so that's fine. What does the plan look like now, day by day?",
        "Day 1 Hamburg to Paris, evening train to Bordeaux. Days 2 and 3 Bordeaux. Day 4 to San Sebastián, day 5 "
        "there. Day 6 by train to Salamanca, day 7 there. Day 8 the noon coach to Porto. Day 9 Porto until the "
        "evening, then the train to Lisbon. Days 10 and 11 Lisbon. Day 12 the flight home to Hamburg, around noon "
        "so that nobody has to hurry.",
    ),
    (
        "It may rain in the north. What can we do in San Sebastián on a wet day?",
        "Go to the San Telmo museum, which sits in a convent of the sixteenth century and is free on Tuesdays. "
        "The aquarium by the harbour has a glass tunnel. And a wet evening is the best time for pintxos, since "
        "the bars of the old town are half empty then. Ask everywhere for the nuts; the sauces are the only thing "
        "to watch.",
    ),
    (
        "One more thing: my sister wants to swim in the sea once. Where is that best in May?",
        "The water is cold everywhere, 16 degrees in San Sebastián and about the same near Lisbon. I would do it "
        "at La Concha beach on day 5, for the bay is sheltered, there are showers, and it is five minutes from "
        "the old town. The beaches by Cascais are lovely too, but the wind makes them colder in the afternoon.",
    ),
    (
        "Thank you. Please remind me: what was our budget, and what must we not forget because of my sister?",
        "Your budget is 1,800 euros for both of you. For your sister, carry the card that names the nut allergy "
        "in Spanish and Portuguese, look for 'frutos de cáscara' on menus, and leave romesco sauce and almond "
        "desserts alone.",
    ),
)

DEBUGGING: tuple[Exchange, ...] = (
    (
        "My Python script reads a folder of CSV files and writes one report. It takes four minutes for 300 files. "
        "How do I find out why?",
        "Measure before you change anything. Run it under the profiler with `python -m cProfile -s cumtime "
        "report.py` and look at the first ten lines. If most of the time is in reading, the files or the parser "
        "are slow; if it is in a function of your own, look there. Send me the top of the list and we will go on "
        "from it.",
    ),
    (
        "The top line is a function `merge_rows`, 212 of 240 seconds. It does `table = pd.concat([table, new])` "
        "in a loop.",
        "That is it. Each concat copies the whole table so far, so the work grows with the square of the number "
        "of files. Collect the pieces in a list, and call `pd.concat(pieces, ignore_index=True)` once, after the "
        "loop. For 300 files that should bring the function from 212 seconds to one or two.",
    ),
    (
        "Great, the script now takes 31 seconds. But the report has 18 rows fewer than before. Did I lose data?",
        "Possibly not. Before, the index came from each file, so the same label stood many times; with "
        "`ignore_index=True` the labels are new. If a later step drops duplicates or joins by index, it now sees "
        "other rows. Search the script for `drop_duplicates`, `join` and `loc`, and tell me what you find.",
    ),
    (
        "There is `table.loc[table.index.isin(valid)]`, and `valid` is a list of line numbers that a colleague "
        "checked by hand.",
        "Then that line is the cause: it means the line number within a file, and those labels are gone. Keep the "
        "number as a column when you read, with `piece['line'] = piece.index`, and filter by that column. Do it "
        "before the concat, since the numbers are only right within their file. The 18 rows should come back.",
    ),
    (
        "They are back, all of them. Now three files fail with UnicodeDecodeError at byte 0xe4. What is that?",
        "0xe4 is the letter ä in Latin-1 and in Windows-1252, and it can't stand alone in UTF-8. So those three "
        "files were saved by another program, most likely a spreadsheet on Windows. Read them with "
        "`encoding='cp1252'`. Don't use `errors='ignore'`, which would drop the letters silently and spoil the "
        "names.",
    ),
    (
        "I can't know which files will be like that. Can I decide it in the program?",
        "Yes. Try UTF-8 first and fall back to cp1252 only when it fails: text with an ä in cp1252 is almost "
        "never valid UTF-8, so the order is safe. Log the name of each file that took the second way. When the "
        "log names a file that should have been UTF-8, you will want to know.",
    ),
    (
        "Works. Of the 31 seconds, 24 are now in `read_csv`. The files have 60 columns, and I use 7 of them.",
        "Then pass `usecols` with your seven names; the parser skips the rest. Give it `dtype` for them as well, "
        "so that it need not guess, and keep identifiers as strings, or leading zeros are lost. If that is not "
        "enough, `engine='pyarrow'` reads with several threads. I would expect 24 seconds to become six or so.",
    ),
    (
        "It is 5 seconds now. How do I make sure that the next change does not lose rows again?",
        "Write one test. Take three small files: a plain one, one in cp1252 with an ä, and one with a repeated "
        "line number. Run the whole script on them and compare the report with a copy that you have checked by "
        "hand. Add an assertion to the script too: the rows of the report must equal the sum of the rows of the "
        "files, less those that were filtered.",
    ),
    (
        "The test found something: the row with the ä comes out twice. Why?",
        "Look at the fallback. If the UTF-8 attempt reads in chunks, the first chunk may succeed before the "
        "second one fails, and its rows are already in your list. Append to the list only after the whole file "
        "was read, so put the append behind the `try`, in its `else` branch. Then a failed attempt leaves nothing "
        "behind.",
    ),
    (
        "That was it, thank you. Can you sum up what made it slow at first, and what made the 18 rows disappear?",
        "It was slow because `pd.concat` in the loop copied the whole table for every file. The 18 rows went "
        "missing because the filter by line number used the index, and `ignore_index=True` had given the rows new "
        "labels.",
    ),
)

TOPICS: dict[str, tuple[Exchange, ...]] = {"trip": TRIP, "debugging": DEBUGGING}


@dataclass(config=ConfigDict(extra="forbid"))
class Dialogue(Workload):
    """The memory is the first k exchanges of a conversation, the query is the user's next turn, for k = 1 … `turns`.

    The texts are not cut to token counts. Each memory begins with the previous one, so a scenario can extend it.

    topic: the conversation.
    system: a system message at the start of it; null adds none.
    """

    topic: Literal["trip", "debugging"] = "trip"
    turns: PositiveInt = 8
    system: str | None = None
    max_cells: PositiveInt | None = None

    def __post_init__(self) -> None:
        longest = len(TOPICS[self.topic]) - 1
        if self.turns > longest:
            raise ConfigError(
                f"workload.turns={self.turns}: the conversation {self.topic!r} has {longest} turns that precede a "
                f"question. Choose {longest} or less."
            )

    def cells(self, template: PromptTemplate, separator: str) -> Sequence[Cell]:
        """Raises PromptError if the template is plain, because it has no turns."""
        if template.kind != "chat":
            raise PromptError("workload=dialogue consists of chat turns. Use template=chat, or another workload.")
        return list(islice(self._cells(template), self.max_cells))

    def _cells(self, template: PromptTemplate) -> Iterator[Cell]:
        exchanges = TOPICS[self.topic]
        history: tuple[Message, ...] = ({"role": "system", "content": self.system},) if self.system else ()
        for k in range(1, self.turns + 1):
            said, answered = exchanges[k - 1]
            history += ({"role": "user", "content": said}, {"role": "assistant", "content": answered})
            question = exchanges[k][0]
            prompt = template.split(template.memory_tokens(history), question)
            yield Cell(
                context="1 turn" if k == 1 else f"{k} turns",
                context_tokens=len(prompt.memory_ids),
                query=f"turn {k + 1}",
                query_tokens=len(prompt.query_ids),
                memories=(history,),
                question=question,
            )
