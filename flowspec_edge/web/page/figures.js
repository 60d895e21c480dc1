// Figures of the text that is written, or was written last, and what was expected of the ring.

const byId = (id) => document.getElementById(id);
const SETTLED_S = 0.5; // before that a rate says little
let first = null; // what the text was at when it was first seen

const number = (value) => (value == null ? "–" : value >= 100 ? value.toFixed(0) : value.toFixed(1));

export function showRates(service) {
  const { planned, planned_without_drafts: plain, without_drafts: measured } = service.ring?.rates ?? {};
  byId("plain-rate").textContent = number(measured);
  byId("plain-note").textContent = plain == null ? "by what boards take" : `planned ${number(plain)}`;
  byId("rate-note").textContent = planned == null ? "measured" : `planned ${number(planned)}`;
}

export function showCounts(text, now) {
  if (!text) return;
  const { num_tokens: tokens, num_verifications: verified, num_rows_sent: sent, num_rows_useful: useful } = text.counts;
  if (first?.session !== text.session || tokens < first.tokens) first = tokens ? { session: text.session, tokens, now } : null;
  if (first && now - first.now > SETTLED_S) byId("rate").textContent = number((tokens - first.tokens) / (now - first.now));
  if (verified) byId("acceptance").textContent = (tokens / verified).toFixed(2);
  if (sent) {
    byId("useful").textContent = `${Math.round((100 * useful) / sent)} %`;
    byId("useful-note").textContent = `of ${sent} sent`;
  }
}

/** What the tree's picture says, for those who do not see it. */
export function treeWords(texts) {
  if (!texts.length) return "No text is being written.";
  const [text] = texts;
  const more = texts.length > 1 ? ` ${texts.length} texts are written; this is ${text.is_own ? "yours" : "the first"}.` : "";
  if (text.num_read < text.num_prompt) return `The prompt is read: ${text.num_read} of ${text.num_prompt} tokens.${more}`;
  const travelling = text.ways.reduce((sum, [rows]) => sum + rows.length, 0);
  const whose = text.is_own ? "" : " Its words are for whoever asked.";
  return `${text.counts.num_tokens} tokens written, ${text.num_drafts} rows drafted, ${travelling} under way.${whose}${more}`;
}
