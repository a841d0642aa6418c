// Where the branches of the tree go: a plain function of the server's answer, without the page.
//
// An icicle that lies on its side. A branch is as wide as it has tokens and begins where its prompt has come to; it is as
// high as all that hangs on it. So a prefix that many prompts share is a tall block with the ways on to its right.

// Returns { boxes, rows, start, stop }: boxes with x and width in tokens, y and height in rows. `root`: the id of the branch
// to look at, or null. What is not shown by the server is one more row, `hidden` saying how many children it stands for.
export function layOut(tree, root) {
  const children = new Map();
  for (const node of tree.nodes) {
    if (!children.has(node.parent)) children.set(node.parent, []);
    children.get(node.parent).push(node);
  }
  const boxes = [];
  let rows = 0;

  function place(node, level) {
    const box = { node, level, x: node.start, width: node.tokens, y: rows, height: 0, hidden: 0 };
    boxes.push(box);
    placeAll(children.get(node.id) ?? [], node.hidden_children, node.start + node.tokens, level + 1);
    if (rows === box.y) rows += 1;
    box.height = rows - box.y;
  }

  function placeAll(nodes, hidden, end, level) {
    for (const node of nodes) place(node, level);
    if (!hidden) return;
    const last = { id: `more-${end}-${rows}` };
    boxes.push({ node: last, level, x: end, width: tree.chunk_tokens, y: rows, height: 1, hidden });
    rows += 1;
  }

  const top = tree.nodes.find((node) => node.id === root);
  if (top) place(top, 1);
  else placeAll(children.get(null) ?? [], tree.hidden_children, 0, 1);
  const start = top ? top.start : 0;
  return { boxes, rows, start, stop: Math.max(start + 1, ...boxes.map((box) => box.x + box.width)) };
}
