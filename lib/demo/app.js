'use strict';

// The page of demo.py: draws images, shows each step of decoding (§3.2), looks into one token,
// edits a picture with a brush, and compares the parallel decoder with the sequential one.

// ------------------------------------------------------------------------------------------ state

const byId = id => document.getElementById(id);
const form = byId('form');
const field = name => form.elements[name];

let about = null;           // what the server says of its run; null until it has answered
let side = 0;               // how many tokens are along a side of an image
let stride = 0;             // how many pixels are along a side of a token

// What was drawn: the answer to /draw, with `images`, a list of <img> for each step, and `photo`,
// the picture that was edited.
let result = null;          // by the parallel decoder, with all its steps
let sequential = null;      // in Compare: by the sequential decoder, with its last step only
let timings = {};           // in Compare: timings[number of images][decoder], in seconds
let chosenImage = 0;
let chosenToken = null;     // its place in raster order

let photo = null;           // in Edit: {image, number}; the number of a validation image, or null
let region = [];            // in Edit: for each token whether it is painted over
let brushPlace = 0;
let brushing = false;

let drawing = null;         // the AbortController of the request under way; null if there is none
let looking = null;         // the AbortController of the last question about a token
let film = null;            // the timer of the player while it plays
let delay = null;           // the timer of a request that is delayed

const mode = () => field('mode').value;
const isEditing = () => mode() === 'edit';
const isComparing = () => mode() === 'compare';
const isRacing = () => isComparing() && sequential !== null;
const numberOfSteps = () => result.masked.length;
const shownTime = () => Number(byId('time').value);     // a step; in a race, one of its moments
const lastTime = () => isRacing() ? MOMENTS : numberOfSteps();
const shownStep = () => isRacing() ? passesDone('parallel') : shownTime();

// Which tokens of an image are masked after a step; step 0 is the start.
const maskedAfter = (step, image) => step ? result.masked[step - 1][image] : result.unknown;
// The picture after a step; undefined while it is not fetched, null before anything is predicted.
const imageAfter = (step, image) => step ? result.images[step - 1]?.[image] : result.photo;
const count = flags => flags.filter(Boolean).length;
// A number with its noun, as in "1 pass" and "8 passes".
const counted = (number, one, many) => `${number} ${number === 1 ? one : many}`;

// The form's values by the names of flags, without the mode and the class, which are no flags.
function settings() {
  const {mode: _, class: __, ...values} = Object.fromEntries(new FormData(form));
  return values;
}

function makeElement(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ----------------------------------------------------------------------------------------- server

// Asks the server and yields its answer, line by line. Every answer is read here: a line in which
// the server says that it is busy with another request is shown, and is no part of the answer.
async function* ask(path, body, signal) {
  try {
    const headers = about ? {'X-Run': about.run_id} : {};
    const response = await fetch(path, {method: 'POST', headers, body, signal});
    for await (const line of readLines(response.body)) {
      signal?.throwIfAborted();                     // this line may have come before the abort
      const news = JSON.parse(line);
      byId('waiting').hidden = !news.waits;
      if (news.error) throw Error(news.error);
      if (news.end) return;
      if (!news.waits) yield news;
    }
    throw Error('the server stopped in the midst of its answer: see the terminal of demo.py');
  } catch (error) {
    // fetch() and its stream raise a TypeError when the connection fails.
    const failed = error instanceof TypeError;
    throw failed ? Error('the server does not answer: is demo.py still running?') : error;
  } finally {
    byId('waiting').hidden = true;
  }
}

async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];          // of the line that has not ended yet
  while (true) {
    const {value, done} = await reader.read();
    if (done) return;
    const [end, ...starts] = value.split('\n');
    pieces.push(end);
    for (const start of starts) {
      yield pieces.join('');
      pieces = [start];
    }
  }
}

// Asks for an answer of one line.
async function askOnce(path, body, signal) {
  let answer;
  for await (const news of ask(path, body, signal)) answer = news;
  return answer;
}

async function loadImage(url) {
  const image = makeElement('img', {src: url});
  await image.decode();
  return image;
}

// --------------------------------------------------------------------------- the life of a request

// A request is to draw, edit, compare, or read a picture to edit. Its states:
//
//   delayed     A setting has just changed: runSoon() waits in case another one does. `delay` is
//               its timer.
//   under way   takeOver() has begun it; say(…, true) reports its progress, and Stop works.
//               `drawing` is its AbortController. If the server is still busy with another page,
//               ask() says so, as it does for every question.
//   over        finish() has said how it went: it is done, or something is missing to begin with.
//               Or fail() has: it was stopped, or there was an error. `drawing` is null.
//   taken over  Another request began before this one was over. This one is aborted and says
//               nothing more: ask() yields no more of its lines, and fail() ignores it.
//
// So at most one is under way. Meanwhile look() asks about no token, since the server answers one
// question at a time; finish() calls look() again.

// Draws when nothing has changed for a moment.
function runSoon() {
  clearTimeout(delay);
  delay = setTimeout(run, 250);
}

// Begins a request, in place of one that is delayed or under way, and returns its signal.
function takeOver() {
  clearTimeout(delay);
  drawing?.abort();
  looking?.abort();
  drawing = new AbortController();
  byId('bar').value = 0;
  return drawing.signal;
}

// Ends the request that is under way.
function finish(text) {
  drawing = null;
  say(text);
  look();
}

// Ends the request of this signal, which was stopped or has failed.
function fail(error, signal) {
  if (signal !== drawing?.signal) return;           // it was taken over
  const stopped = error.name === 'AbortError';
  finish(stopped ? 'stopped' : '');
  if (!stopped) complain(error);
}

// Shows the state of the work.
function say(text, busy = false) {
  byId('status').textContent = text;
  byId('problem').hidden = true;
  byId('stop').disabled = !busy;
  byId('bar').hidden = !busy;
}

// Shows an error below the state of the work.
function complain(error) {
  byId('problem').textContent = error.message;
  byId('problem').hidden = false;
}

byId('stop').onclick = () => drawing?.abort();

// --------------------------------------------------------------------------- drawing and comparing

// Draws, edits or compares as the form says. A call takes over from the one before it.
async function run() {
  const signal = takeOver();
  keepLink();
  if (isEditing() && !photo) return finish('Drop a photo on the page, or use a validation image.');
  if (isEditing() && !region.includes(true)) return finish('Paint over what should change.');
  const classIndex = field('class').value;
  const request = {settings: settings(), label: classIndex === '' ? null : Number(classIndex)};
  if (isEditing()) {
    request.picture = photo.image.src;
    request.region = region;
  }
  pause();
  say('starting …', true);
  try {
    await draw(request, signal);
    if (isComparing()) {
      await draw({...request, settings: {...request.settings, decoder: 'autoregressive'}}, signal);
      await measure(request.settings, signal);
    }
    finish(summary(request.label));
    if (isComparing() && !matchMedia('(prefers-reduced-motion)').matches) play();
  } catch (error) {
    fail(error, signal);
  }
}

// Fetches images, and shows them as they come.
async function draw(request, signal) {
  const edited = request.picture ? photo.image : null;
  let drawn = null;
  for await (const news of ask('/draw', JSON.stringify(request), signal)) {
    if (news.done) {
      say(`pass ${news.done} of ${news.of}`, true);
      byId('bar').value = news.done / news.of;
    } else if (news.sampled) {
      drawn = {...news, images: [], photo: edited, typedSettings: request.settings};
      show(drawn);
      say('turning tokens into pixels …', true);
    } else {
      byId('bar').value = 1 - (news.step - 1) / drawn.masked.length;
      drawn.images[news.step - 1] = await Promise.all(news.images.map(loadImage));
      showStep();
    }
  }
}

// Puts what was drawn into the page.
function show(drawn) {
  if (drawn.settings.decoder === 'autoregressive') {
    sequential = drawn;
  } else {
    result = drawn;
    sequential = null;
    timings = {};
    chosenImage = Math.min(chosenImage, drawn.labels.length - 1);
  }
  byId('play').disabled = false;
  showThumbnails(byId('images'), result);
  showThumbnails(byId('sequential-images'), sequential);
  showTable();
  byId('time').max = lastTime();
  goTo(lastTime());
}

function summary(askedLabel) {
  const drawn = result.labels.length;
  let classes = 'each class in turn';
  const isOneClass = askedLabel !== null || result.photo || drawn === 1;
  if (isOneClass) classes = about.classes[result.labels[0]];
  if (askedLabel === null && result.photo) classes += ', the class that fits best';
  const images = counted(drawn, 'image', 'images');
  const passes = counted(numberOfSteps(), 'pass', 'passes');
  if (sequential) return `${images} (${classes}) by both decoders`;
  return `${images} (${classes}) in ${passes}: ${result.seconds.toFixed(2)} s`;
}

// --------------------------------------------------------------------------------------- canvases

const MASK_COLOUR = '#808080';
const FRAME_COLOUR = '#ff5a00';

// Makes a canvas `scale` times as large as an image, grey, and returns its context.
function prepare(canvas, scale) {
  canvas.width = about.size * scale;
  canvas.height = about.size * scale;
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = !document.body.classList.contains('small-images');
  context.fillStyle = MASK_COLOUR;
  context.fillRect(0, 0, canvas.width, canvas.height);
  return context;
}

// By how much an image is enlarged to be about so many pixels wide.
const scaleTo = width => Math.max(1, Math.round(width / about.size));

// Paints an image with a grey of this opacity over its masked tokens.
function paint(canvas, image, masked, scale, opacity) {
  const context = prepare(canvas, scale);
  if (!image) return;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  masked.forEach((isMasked, place) => {
    if (isMasked) fillToken(context, place, scale, `rgb(128 128 128 / ${opacity})`);
  });
}

function fillToken(context, place, scale, colour) {
  const width = stride * scale;
  context.fillStyle = colour;
  context.fillRect(place % side * width, Math.floor(place / side) * width, width, width);
}

function outlineToken(context, place, scale, colour, lineWidth) {
  const left = place % side * stride * scale;
  const top = Math.floor(place / side) * stride * scale;
  const width = stride * scale - lineWidth;
  context.strokeStyle = colour;
  context.lineWidth = lineWidth;
  context.strokeRect(left + lineWidth / 2, top + lineWidth / 2, width, width);
}

// Fills a container with small pictures of what was drawn; each is a button that chooses its image.
function showThumbnails(container, drawn) {
  container.replaceChildren();
  if (!drawn) return;
  drawn.labels.forEach((label, index) => {
    const name = about.classes[label];
    const button = makeElement('button', {
      type: 'button',
      className: 'thumbnail',
      title: name,
      ariaLabel: `image ${index + 1}, ${name}`,
    }, makeElement('canvas'), name);
    button.onclick = () => {
      chosenImage = index;
      showStep();
      look();
    };
    container.append(button);
  });
}

// Shows the step that the player is at, in all pictures and panels.
function showStep() {
  if (!result) return;
  const step = shownStep();
  byId('time-text').textContent = `t = ${step} of ${numberOfSteps()}`;
  byId('save').disabled = !imageAfter(step, chosenImage);
  byId('take').disabled = !imageAfter(step, chosenImage);
  const small = scaleTo(isComparing() && result.labels.length === 1 ? 320 : 96);
  [...byId('images').children].forEach((button, index) => {
    button.ariaPressed = index === chosenImage;
    paint(button.firstChild, imageAfter(step, index), maskedAfter(step, index), small, 0.85);
  });
  if (isComparing()) {
    showRace(small);
    return;
  }
  const large = scaleTo(320);
  const image = imageAfter(step, chosenImage);
  const masked = maskedAfter(step, chosenImage);
  paint(byId('predicted'), image, masked, large, step ? 0 : 1);
  paint(byId('masked'), image, masked, large, 0.85);
  byId('masked-text').textContent = `still masked: ${count(masked)} of ${about.tokens} tokens`;
  showConfidence(step, large);
  showSchedule(step);
  byId('sentences').replaceChildren(...sentences(step).map(text => makeElement('li', {}, text)));
  if (chosenToken === null) return;
  for (const id of ['predicted', 'masked', 'confidence']) {
    outlineToken(byId(id).getContext('2d'), chosenToken, large, FRAME_COLOUR, 3);
  }
}

// From dark blue for 0 to light yellow for 1.
const heat = value => `hsl(${250 - 200 * value} 75% ${22 + 46 * value}%)`;

// Shows the confidence of the tokens that were still masked before this step.
function showConfidence(step, scale) {
  const context = prepare(byId('confidence'), scale);
  const caption = byId('confidence-text');
  if (!step) {
    caption.textContent = 'confidence: nothing is predicted yet';
    return;
  }
  const before = maskedAfter(step - 1, chosenImage);
  const after = maskedAfter(step, chosenImage);
  const values = result.confidence[step - 1][chosenImage];
  const shown = values.filter((_, place) => before[place]);
  const low = Math.min(...shown);
  const high = Math.max(...shown);
  values.forEach((value, place) => {
    if (!before[place]) return;
    fillToken(context, place, scale, heat(high > low ? (value - low) / (high - low) : 1));
    if (!after[place]) outlineToken(context, place, scale, '#fff', Math.max(2, scale / 3));
  });
  caption.textContent = `confidence, ${low.toFixed(1)} to ${high.toFixed(1)}; `
    + 'white frame: kept at this step; grey: known before';
}

// The place of the token under the pointer; null outside of the canvas.
function placeUnder(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / box.width * side);
  const row = Math.floor((event.clientY - box.top) / box.height * side);
  const inside = column >= 0 && column < side && row >= 0 && row < side;
  return inside ? row * side + column : null;
}

const ARROWS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

// The place to which an arrow key leads from a place; null for other keys.
function placeAfterKey(event, place) {
  if (!(event.key in ARROWS)) return null;
  event.preventDefault();
  const [down, right] = ARROWS[event.key];
  const inside = index => Math.max(0, Math.min(side - 1, index));
  return inside(Math.floor(place / side) + down) * side + inside(place % side + right);
}

// ------------------------------------------------------------------- panels: the step in numbers

// The scale of the noise in the choice of the tokens to keep; the other orders have none.
function noiseAt(drawn, step) {
  if (drawn.settings.order !== 'confidence') return 0;
  return drawn.settings.choice_temperature * (1 - step / drawn.masked.length);
}

// §3.2 in the numbers of this step.
function sentences(step) {
  const total = result.counts[0];
  if (!step) return [`Masked at the start: ${total} of ${about.tokens} tokens.`];
  const before = result.counts[step - 1];
  const after = result.counts[step];
  const time = `${step}/${numberOfSteps()}`;
  const gamma = result.gammas[step];
  const scheduled = Math.floor(Math.fround(gamma * total));         // as the decoder, in float32

  const {order, choice_temperature: temperature} = result.settings;
  let confidence = `the order “${order}” gives its confidence.`;
  if (order === 'confidence') confidence = 'its confidence is log p, without noise.';
  const noise = noiseAt(result, step);
  if (noise) {
    confidence = `its confidence is log p plus ${temperature} · (1 − ${time}) = `
      + `${noise.toFixed(2)} times Gumbel noise.`;
  }
  let schedule = `n = ⌊γ(${time}) · ${total}⌋ = ⌊${gamma.toFixed(3)} · ${total}⌋ = ${scheduled}`;
  if (scheduled === after) schedule += '.';
  else if (before === after) schedule += `, but at least one stays masked: ${after}.`;
  else schedule += `, but at least one, and fewer than before: ${after}.`;
  let choice = `the ${counted(after, 'least confident is', 'least confident are')} masked again; `
    + `${counted(before - after, 'is', 'are')} kept.`;
  if (after === 0) choice = 'none; the rest is kept.';
  const masked = counted(before, 'masked place', 'masked places');
  const known = counted(about.tokens - before, 'known token', 'known tokens');
  return [
    `Predict: in one pass, the probabilities of ${about.codes} codes at ${masked}, `
      + `from ${known} and the class.`,
    `Sample: a token for each of these; ${confidence}`,
    `Mask schedule: ${schedule}`,
    `Mask: ${choice}`,
  ];
}

const MOST_DOTS = 48;                   // of steps on the curve of γ: more would cover it

// Shows the curve of γ with this step on it.
function showSchedule(step) {
  const passes = numberOfSteps();
  const gamma = result.gammas[step];
  const left = ratio => 34 + 270 * ratio;
  const top = value => 170 - 150 * value;
  const points = result.curve.map((value, index) => `${left(index / 100)},${top(value)}`);
  byId('curve').setAttribute('points', points.join(' '));
  byId('guide').setAttribute('d', `M${left(step / passes)} 170V${top(gamma)}H34`);
  byId('now').setAttribute('cx', left(step / passes));
  byId('now').setAttribute('cy', top(gamma));
  const dots = passes > MOST_DOTS ? [] : result.gammas;
  byId('steps').replaceChildren(...dots.map((value, index) => {
    const dot = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
    dot.setAttribute('cx', left(index / passes));
    dot.setAttribute('cy', top(value));
    dot.setAttribute('r', 2.5);
    return dot;
  }));
  byId('ratio-text').textContent = `r = t / T = ${step} / ${passes}`;
  byId('gamma-text').textContent =
    `γ(r) = ${gamma.toFixed(3)}; masked: ${result.counts[step]} of ${result.counts[0]}`;
}

// ---------------------------------------------------------------------------- panels: one token

// Asks what the model predicted for the chosen token at this step, and shows it.
async function look() {
  looking?.abort();
  if (isComparing()) return;
  const panel = byId('token');
  const step = result && shownStep();
  panel.classList.remove('stale');
  if (chosenToken === null) {
    panel.replaceChildren('Point at a token in the pictures, or choose one with the arrow keys.');
    return;
  }
  if (!step) {
    panel.replaceChildren('Nothing is predicted yet.');
    return;
  }
  panel.classList.add('stale');
  if (drawing) return;                              // finish() will look again
  looking = new AbortController();
  const {signal} = looking;
  const drawn = result;
  const image = chosenImage;
  const place = chosenToken;
  const wasMasked = maskedAfter(step - 1, image);
  const before = drawn.sampled[Math.max(0, step - 2)][image];
  const request = {
    settings: drawn.typedSettings,
    label: drawn.labels[image],
    step,
    visible: before.map((code, index) => wasMasked[index] ? null : code),
    sampled: drawn.sampled[step - 1][image],
    place,
  };
  try {
    await new Promise(resolve => setTimeout(resolve, 80));      // the pointer may only pass by
    if (signal.aborted) return;
    const answer = await askOnce('/look', JSON.stringify(request), signal);
    panel.replaceChildren(makeElement('p', {}, tokenSentence(drawn, image, place, step, answer)));
    panel.append(...codeRows(answer, request.sampled[place]), samplerNote(drawn.settings));
    panel.classList.remove('stale');
  } catch (error) {
    if (error.name === 'AbortError') return;
    panel.replaceChildren(error.message);
    panel.classList.remove('stale');
  }
}

// A row for each code: the picture around it, its number, a bar and its probability.
function codeRows(answer, sampledCode) {
  const highest = Math.max(...answer.probabilities);
  return answer.codes.map((code, index) => {
    const probability = answer.probabilities[index];
    const bar = makeElement('div', {className: 'probability'});
    bar.style.width = `${100 * probability / highest}%`;
    const patch = makeElement('img', {src: answer.patches[index], alt: `code ${code} in place`});
    const percent = `${(100 * probability).toFixed(2)}%`;
    const className = code === sampledCode ? 'code sampled' : 'code';
    return makeElement('div', {className}, patch, code, bar, percent);
  });
}

// Says so if tokens are not sampled from the probabilities that are shown.
function samplerNote({temperature, top_k: topK}) {
  if (temperature === 1 && !topK) return '';
  let text = `These are the model’s probabilities; tokens are sampled at temperature ${temperature}`;
  if (topK) text += ` among the ${topK} likeliest codes`;
  return makeElement('p', {className: 'soft'}, `${text}.`);
}

// What happened to a token at a step, in words. Here log p is computed anew, so it is rounded
// differently (in bfloat16 noticeably), hence ≈.
function tokenSentence(drawn, image, place, step, answer) {
  const code = drawn.sampled[step - 1][image][place];
  const row = Math.floor(place / side) + 1;
  const start = `row ${row}, column ${place % side + 1}, step ${step}: `;
  if (!drawn.unknown[place]) return start + 'a token of the picture, known from the start.';
  const keptAt = drawn.masked.findIndex(masks => !masks[image][place]) + 1;
  if (keptAt < step) {
    return start + `code ${code}, kept since step ${keptAt}; what is predicted now is ignored.`;
  }
  const logP = Math.log(answer.probabilities[answer.codes.indexOf(code)]);
  const confidence = drawn.confidence[step - 1][image][place];
  let text = `code ${code} was sampled, log p ≈ ${logP.toFixed(2)}, `;
  if (noiseAt(drawn, step)) text += `noise ≈ ${(confidence - logP).toFixed(2)}, `;
  text += `confidence ${confidence.toFixed(2)}; `;
  text += keptAt === step ? 'kept from now on.' : `masked again, and kept at step ${keptAt}.`;
  return start + text;
}

function chooseToken(place) {
  if (place === chosenToken || place === null || !result) return;
  chosenToken = place;
  showStep();
  look();
}

for (const id of ['predicted', 'masked', 'confidence']) {
  byId(id).onpointermove = event => chooseToken(placeUnder(event));
  byId(id).onpointerdown = event => chooseToken(placeUnder(event));
  byId(id).onkeydown = event => chooseToken(placeAfterKey(event, chosenToken ?? 0));
}

// ------------------------------------------------------------------------------ panels: the player

function goTo(time) {
  byId('time').value = time;
  showStep();
  look();
}

// Plays on from the time that is shown, or from the start if that is the end.
function play() {
  pause();
  if (shownTime() >= lastTime()) goTo(0);
  const first = shownTime();
  const started = performance.now();
  const interval = isRacing() ? 1000 * playedSeconds() / MOMENTS : 500;
  byId('play').textContent = '❚❚ Pause';
  film = setInterval(() => {
    // The clock decides: a timer may come late.
    const time = first + Math.round((performance.now() - started) / interval);
    if (time > shownTime()) goTo(Math.min(time, lastTime()));
    if (shownTime() >= lastTime()) pause();
  }, interval);
}

function pause() {
  clearInterval(film);
  film = null;
  byId('play').textContent = '▶ Play';
}

function save() {
  const image = imageAfter(shownStep(), chosenImage);
  if (!image) return;
  const download = `maskgit-${result.settings.seed}-${chosenImage + 1}.png`;
  makeElement('a', {href: image.src, download}).click();
}

byId('play').onclick = () => film ? pause() : play();
byId('save').onclick = save;
byId('time').oninput = () => {
  pause();
  goTo(shownTime());
};

// ------------------------------------------------------------- panels: both decoders in comparison

const DECODERS = {parallel: 'in parallel', autoregressive: 'token by token'};
const TIMED_NUMBERS = [1, 4, 16];       // of images
const MOMENTS = 512;                    // of the race that the player shows
const MOST_BOXES = 64;                  // of passes that are told apart in the race
const SHORTEST_PLAY = 5;                // seconds

const passesOf = decoder => decoder === 'parallel' ? numberOfSteps() : about.tokens;
const drawnSeconds = () => timings[result.labels.length] ?? {};
const longestTime = () => Math.max(...Object.values(drawnSeconds()));
const raceIsTimed = () => Object.values(drawnSeconds()).length === 2;
const raceTime = () => shownTime() / MOMENTS * longestTime();
const playedSeconds = () => Math.max(SHORTEST_PLAY, longestTime());
const usedGuidance = () => Number(result.settings.cfg ?? about.defaults.cfg);

// How many passes of a decoder are done at the moment that the player shows; each takes as long.
function passesDone(decoder) {
  const passes = passesOf(decoder);
  if (!raceIsTimed()) return passes;
  const done = Math.floor(passes * raceTime() / drawnSeconds()[decoder] + 1e-6);
  return Math.min(passes, done);
}

// Asks how long both decoders take, first for as many images as were drawn.
async function measure(settings, signal) {
  const drawn = result.labels.length;
  const numbers = [drawn, ...TIMED_NUMBERS.filter(number => number !== drawn)];
  for (const number of numbers) timings[number] = {};
  let measured = 0;
  for await (const news of ask('/clock', JSON.stringify({settings, numbers}), signal)) {
    if (news.seconds) {
      timings[news.num][news.decoder] = news.seconds;
      measured += 1;
      showTable();
      showStep();
    } else {
      const images = counted(news.num, 'image', 'images');
      say(`timing ${images} ${DECODERS[news.decoder]} …`, true);
      byId('bar').value = measured / numbers.length / 2;
    }
  }
}

// Three digits, as of 0.0283 s and 12.3 s; a clock's digits stay where they are.
const inSeconds = time => `${Number(time.toPrecision(3))} s`;
const onClock = time => `${time.toFixed(longestTime() < 10 ? 3 : 1)} s`;

// Shows the moment of the race that the player is at.
function showRace(scale) {
  const decoded = passesDone('autoregressive');
  const notDecoded = Array.from({length: about.tokens}, (_, place) => place >= decoded);
  [...byId('sequential-images').children].forEach((button, index) => {
    button.ariaPressed = index === chosenImage;
    paint(button.firstChild, sequential.images[0]?.[index], notDecoded, scale, 1);
  });
  byId('race').hidden = !raceIsTimed();
  byId('time-text').textContent = raceIsTimed() ? onClock(raceTime()) : '';
  byId('playhead').style.left = `${100 * shownTime() / MOMENTS}%`;
  for (const decoder of Object.keys(DECODERS)) {
    const done = passesDone(decoder);
    const passes = passesOf(decoder);
    byId(`${decoder}-clock`).textContent = '';
    byId(`${decoder}-passes`).textContent = '';
    if (!raceIsTimed()) continue;
    const time = Math.min(raceTime(), drawnSeconds()[decoder]);
    byId(`${decoder}-clock`).textContent = onClock(time);
    byId(`${decoder}-clock`).classList.toggle('finished', done === passes);
    byId(`${decoder}-passes`).textContent = `pass ${done} of ${passes}`;
    [...byId(`${decoder}-track`).children].forEach((pass, index) => {
      pass.className = index < done ? 'done' : '';
    });
  }
}

// Shows what does not change while the race is played: texts, the axis, and the table of times.
function showTable() {
  const guidance = usedGuidance();
  let parallel = 'each predicts all tokens';
  if (guidance) parallel += `, twice: with the class and without, for guidance ${guidance}`;
  const passes = counted(numberOfSteps(), 'pass', 'passes');
  byId('parallel-text').textContent = `${passes}; ${parallel}.`;
  byId('autoregressive-text').textContent =
    `${about.tokens} passes; each predicts one token, without guidance.`;
  byId('times-text').textContent = `In parallel in ${passes} `
    + `${guidance ? `with guidance ${guidance}` : 'without guidance'}, token by token in `
    + `${about.tokens} passes; the fastest of up to five runs.`;
  byId('times').replaceChildren(...Object.entries(timings).map(timeRow));
  byId('reasons').replaceChildren();
  if (timings[1]?.autoregressive && timings[16]?.autoregressive) {
    byId('reasons').append(...reasons());
  }
  if (!raceIsTimed()) return;
  for (const decoder of Object.keys(DECODERS)) {
    const track = byId(`${decoder}-track`);
    track.style.width = `${100 * drawnSeconds()[decoder] / longestTime()}%`;
    track.classList.toggle('dense', passesOf(decoder) > MOST_BOXES);
    track.replaceChildren(...Array.from({length: passesOf(decoder)}, () => makeElement('i')));
  }
  byId('axis').replaceChildren(...axisTicks());
  let speed = 'at its own speed';
  const slower = playedSeconds() / longestTime();
  if (slower > 1) speed = `${slower.toPrecision(2)} times slower`;
  let boxes = 'Each box is a pass';
  if (about.tokens > MOST_BOXES) boxes = 'The bars fill pass by pass';
  byId('race-text').textContent =
    `${boxes}; the times are the transformer's on ${about.device}, shown ${speed}.`;
}

function timeRow([number, times]) {
  const row = makeElement('tr', {}, makeElement('th', {}, number));
  for (const decoder of Object.keys(DECODERS)) {
    row.append(makeElement('td', {}, times[decoder] ? inSeconds(times[decoder]) : '…'));
  }
  let verdict = '…';
  if (times.parallel && times.autoregressive) {
    const ratio = times.autoregressive / times.parallel;
    verdict = `${ratio.toFixed(1)} × faster`;
    if (ratio < 1) verdict = `${(1 / ratio).toFixed(1)} × slower`;
  }
  row.append(makeElement('td', {}, verdict));
  return row;
}

// Labels at round times, 1, 2 or 5 of some power of ten apart: at most five, none at the very end,
// where there is no room for it.
function axisTicks() {
  const longest = longestTime();
  const power = 10 ** Math.floor(Math.log10(longest / 5));
  const distance = power * [1, 2, 5, 10].find(factor => factor * power * 5 >= longest);
  const ticks = [];
  for (let time = 0; time < 0.9 * longest; time += distance) {
    const tick = makeElement('span', {}, inSeconds(time));
    tick.style.left = `${100 * time / longest}%`;
    ticks.push(tick);
  }
  return ticks;
}

// Says what the time is spent on: on arithmetic if it grows with the number of images, on waiting
// for the passes if it does not.
function reasons() {
  const gpu = about.device !== 'cpu';
  const texts = Object.entries(DECODERS).map(([decoder, name]) => {
    const growth = timings[16][decoder] / timings[1][decoder];
    const waiting = 1 - (growth - 1) / 15;              // the share that all images have in common
    const start = `${name[0].toUpperCase()}${name.slice(1)}, 16 images take `
      + `${growth.toFixed(1)} times as long as one: `;
    if (waiting < 0.5) return start + 'one image waits mostly for arithmetic.';
    const starting = gpu ? 'for the CPU to start the operations' : 'for operations to start';
    return `${start}one image waits mostly ${starting} and for the weights to be read, in each `
      + 'pass anew.';
  });
  const copies = usedGuidance() ? 2 : 1;
  const computed = copies * numberOfSteps() * about.tokens;
  const counts = `${counted(numberOfSteps(), 'pass', 'passes')} against ${about.tokens}, `
    + `${computed} tokens computed for an image against ${about.tokens}`;
  texts.push(gpu
    ? `A GPU computes all tokens about as fast as one, so the passes decide: ${counts}.`
    : `A CPU computes few tokens at once, so besides the passes the tokens count: ${counts}.`);
  return texts.map(text => makeElement('p', {}, text));
}

// ------------------------------------------------------------------------------ panels: the editor

// Takes the picture that the server answers with as the one to edit.
async function takePicture(path, body, number) {
  const signal = takeOver();
  say('reading the picture …', true);
  try {
    const answer = await askOnce(path, body, signal);
    const image = await loadImage(answer.picture);
    signal.throwIfAborted();                        // it may have been taken over meanwhile
    photo = {image, number};
    field('mode').value = 'edit';
  } catch (error) {
    showMode();                                     // a link may have chosen another mode
    fail(error, signal);
    return;
  }
  await changeMode();
}

function upload(file) {
  if (!file || !about) return;                      // nothing was chosen, or the page is loading
  if (file.size > about.max_upload) {
    complain(Error(`this file is larger than ${about.max_upload / 1e6} MB: reduce it`));
    return;
  }
  takePicture('/photo', file, null);
}

function takeValidationImage(number) {
  return takePicture('/validation', JSON.stringify({number}), number);
}

function takeChosenImage() {
  const image = result && imageAfter(shownStep(), chosenImage);
  if (!image) return;
  photo = {image, number: null};
  changeMode();
}

function showEditor() {
  byId('photo').hidden = !photo;
  if (!photo || !isEditing()) return;
  const scale = scaleTo(320);
  const context = prepare(byId('photo'), scale);
  context.drawImage(photo.image, 0, 0, byId('photo').width, byId('photo').height);
  region.forEach((isPainted, place) => {
    if (isPainted) fillToken(context, place, scale, 'rgb(255 90 0 / 0.6)');
  });
  if (document.activeElement !== byId('photo')) return;
  for (const place of brushedPlaces()) outlineToken(context, place, scale, FRAME_COLOUR, 2);
}

// The tokens under the brush.
function brushedPlaces() {
  const width = Number(byId('brush').value);
  const left = brushPlace % side - Math.floor((width - 1) / 2);
  const top = Math.floor(brushPlace / side) - Math.floor((width - 1) / 2);
  const places = [];
  for (let row = Math.max(0, top); row < Math.min(side, top + width); row++) {
    for (let column = Math.max(0, left); column < Math.min(side, left + width); column++) {
      places.push(row * side + column);
    }
  }
  return places;
}

function brush() {
  for (const place of brushedPlaces()) region[place] = !byId('erase').checked;
  showEditor();
}

// Paints over the tokens for which isInside(column, row) is true, and over no others.
function setRegion(isInside) {
  region = region.map((_, place) => isInside(place % side, Math.floor(place / side)));
  showEditor();
  run();
}

function stopBrushing() {
  if (!brushing) return;
  brushing = false;
  run();
}

byId('photo').onpointerdown = event => {
  brushing = true;
  byId('photo').setPointerCapture(event.pointerId);
  brushPlace = placeUnder(event) ?? brushPlace;
  brush();
};
byId('photo').onpointermove = event => {
  brushPlace = placeUnder(event) ?? brushPlace;
  if (brushing) brush();
  else showEditor();
};
byId('photo').onpointerup = stopBrushing;
byId('photo').onpointercancel = stopBrushing;
byId('photo').onkeydown = event => {
  brushPlace = placeAfterKey(event, brushPlace) ?? brushPlace;
  showEditor();
  if (event.key !== ' ') return;
  event.preventDefault();
  brush();
  runSoon();
};
byId('photo').onfocus = showEditor;
byId('photo').onblur = showEditor;

const margin = () => Math.floor(side / 4);
const isCentral = index => index >= margin() && index < side - margin();

byId('open').onclick = () => byId('file').click();
byId('file').onchange = () => {
  upload(byId('file').files[0]);
  byId('file').value = '';
};
byId('validation').onclick = () => takeValidationImage((photo?.number ?? -1) + 1);
byId('take').onclick = takeChosenImage;
byId('centre').onclick = () => setRegion((column, row) => isCentral(column) && isCentral(row));
byId('right-half').onclick = () => setRegion(column => column >= Math.floor(side / 2));
byId('clear').onclick = () => setRegion(() => false);
byId('feather').oninput = runSoon;

document.ondragover = event => {
  event.preventDefault();
  document.body.classList.add('drop');
};
document.ondragleave = () => document.body.classList.remove('drop');
document.ondrop = event => {
  event.preventDefault();
  document.body.classList.remove('drop');
  upload(event.dataTransfer.files[0]);
};

// --------------------------------------------------- panels: the form, and the link that holds it

// How many images are drawn in each mode; fillForm() says how many without comparison.
const numberInMode = {compare: 1};

function changeMode() {
  showMode();
  return run();
}

// Shows the parts of the page that belong to the mode.
function showMode() {
  document.body.classList.toggle('comparing', isComparing());
  field('num').value = numberInMode[mode()];
  byId('editor').hidden = !isEditing();
  byId('go').textContent = {draw: 'Draw', edit: 'Repaint', compare: 'Compare'}[mode()];
  field('class').options[0].text = isEditing() ? 'the likeliest' : 'each in turn';
  showEditor();
  pause();
  if (result) byId('time').max = lastTime();        // the browser lowers its value, if need be
  goTo(isRacing() ? lastTime() : shownTime());
}

form.oninput = event => {
  if (event.target.name === 'num') numberInMode[mode()] = event.target.value;
  if (event.target.name === 'mode') changeMode();
  else runSoon();
};
form.onsubmit = event => {
  event.preventDefault();
  run();
};
byId('new-seed').onclick = () => {
  field('seed').value = Math.floor(Math.random() * 1e6);
  run();
};
byId('copy-link').onclick = async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    const lacksPhoto = isEditing() && photo?.number === null;
    byId('copy-link').textContent = lacksPhoto ? 'Copied, without the photo' : 'Copied';
  } catch {
    say('The link is in the address bar.');
  }
  setTimeout(() => { byId('copy-link').textContent = 'Copy link'; }, 1500);
};

// Writes the form into the address: mode, class, settings, and in Edit the validation image.
function keepLink() {
  const link = new URLSearchParams({mode: mode(), class: field('class').value, ...settings()});
  if (isEditing() && photo?.number != null) {
    link.set('photo', photo.number);
    link.set('region', region.map(Number).join('').replace(/0+$/, ''));
  }
  history.replaceState(null, '', `#${link}`);
}

// Sets the form as the address says, and draws.
async function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of link) {
    if (field(name)) setField(name, value);
  }
  if (!about.guidance) field('cfg').value = 0;          // the link may be of another run
  if (isComparing() && byId('compare').hidden) field('mode').value = 'draw';
  if (link.has('num')) numberInMode[mode()] = field('num').value;
  const painted = link.get('region') ?? '';
  region = Array.from({length: about.tokens}, (_, place) => painted[place] === '1');
  const number = parseInt(link.get('photo'));
  if (isEditing() && number >= 0) await takeValidationImage(number);
  else await changeMode();
}

// Sets a field, unless it is a choice that does not exist.
function setField(name, value) {
  const input = field(name);
  const choices = [...input.options ?? []].map(option => option.value);
  if (input.tagName !== 'SELECT' || choices.includes(value)) input.value = value;
}

// Fills the form with what the server says of its run: choices, limits and defaults.
function fillForm() {
  byId('about').textContent = `${about.run} on ${about.device}: ${side} × ${side} tokens, `
    + `${about.codes} codes, ${about.size}-pixel images`;
  field('class').append(new Option('', ''));
  about.classes.forEach((name, index) => field('class').append(new Option(name, index)));
  for (const schedule of about.schedules) field('schedule').append(new Option(schedule));
  for (const order of about.orders) field('order').append(new Option(order));
  for (const option of byId('brush').options) {
    if (Number(option.value) <= side / 4) option.selected = true;       // the widest of these
  }
  field('steps').max = about.tokens;
  field('num').max = about.max_images;
  field('top-k').max = about.codes;
  for (const [name, value] of Object.entries(about.defaults)) {
    if (field(name) && value !== null) setField(name, String(value));
  }
  numberInMode.draw = about.defaults.num;
  numberInMode.edit = about.defaults.num;
  byId('guidance').hidden = !about.guidance;
  byId('compare').hidden = !about.decoders.includes('autoregressive');
}

async function start() {
  try {
    about = await askOnce('/about', '{}');
    side = Math.sqrt(about.tokens);
    stride = about.size / side;
    document.body.classList.toggle('small-images', about.size < 128);
    const stops = [0, 0.25, 0.5, 0.75, 1].map(heat);
    byId('heat-scale').style.background = `linear-gradient(90deg, ${stops})`;
    fillForm();
    form.inert = false;
    window.onhashchange = readLink;
    await readLink();
  } catch (error) {
    say('');
    complain(error);
  }
}

start();
