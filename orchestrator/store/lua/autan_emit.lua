-- autan_emit: journals tokens of many requests in one group commit.
-- ARGV  ingress_id, ingress_epoch, k (at most 256), then k x (id, epoch, first_index, tokens as packed uint32)
-- Reply OK, then k x (code, next_index):
--       OK         the tokens from next_index's old value on are appended
--       DUPLICATE  all of them were journaled before, byte for byte
--       STALE      the request has another owner or another epoch      STATE  it is not PREFILLING or DECODING
--       GONE       no such request      GAP  first_index is beyond n    DIVERGED  a re-sent token differs
-- Promise: the journal only grows, one token per index, and only by the owner at the current epoch. A refused item
-- changes nothing and does not touch its neighbours. Items are taken in order.
local function emit_one(c, ingress, ingress_epoch, item)
  local r = load_request(c, item.id)
  if not r then return 'GONE', 0 end
  local n = journal_length(c, item.id)
  if not owns(r, ingress, ingress_epoch) or r.epoch ~= item.epoch then
    count(c, 'stale_refused')
    return 'STALE', n
  end
  if not HELD[r.state] then return 'STATE', n end
  if item.first > n then return 'GAP', n end
  local key = k_journal(c, item.id)
  local known = math.min(n - item.first, #item.tokens / 4)
  if known > 0 then
    local kept = redis.call('GETRANGE', key, item.first * 4, (item.first + known) * 4 - 1)
    if kept ~= string.sub(item.tokens, 1, known * 4) then
      count(c, 'diverged_refused')
      return 'DIVERGED', n
    end
  end
  local fresh = string.sub(item.tokens, known * 4 + 1)
  if #fresh == 0 then return 'DUPLICATE', n end
  return 'OK', redis.call('APPEND', key, fresh) / 4
end

local function autan_emit(keys, args)
  local c = open('autan_emit', keys, args)
  local ingress = take_name(c, 'ingress_id')
  local ingress_epoch = take_epoch(c, 'ingress_epoch')
  local items = {}
  for at = 1, take_int(c, 'k', 0, 256) do
    local item = {id = take_name(c, 'id'), epoch = take_epoch(c, 'epoch'), first = take_int(c, 'first_index', 0, 4294967295)}
    item.tokens = take_bytes(c, 'tokens')
    if #item.tokens % 4 ~= 0 then refuse(c, 'tokens of ' .. item.id .. ' are no whole number of uint32') end
    items[at] = item
  end
  taken_all(c)
  local reply = {'OK'}
  for _, item in ipairs(items) do
    local code, next_index = emit_one(c, ingress, ingress_epoch, item)
    reply[#reply + 1] = code
    reply[#reply + 1] = next_index
  end
  return reply
end
redis.register_function{function_name = 'autan_emit', callback = autan_emit, flags = {'allow-oom'}}
