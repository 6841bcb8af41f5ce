-- autan_look: the state of many requests.
-- ARGV  k (at most 256), then k ids
-- Reply OK, then k x (state, epoch, n, reason, error); five empty strings for an id that is not there
-- Promise: reads only.
local function autan_look(keys, args)
  local c = open('autan_look', keys, args)
  local ids = {}
  for at = 1, take_int(c, 'k', 0, 256) do ids[at] = take_name(c, 'id') end
  taken_all(c)
  local reply = {'OK'}
  for _, id in ipairs(ids) do
    local r = redis.call('HMGET', k_request(c, id), 'state', 'epoch', 'reason', 'error')
    local known = r[1] and true or false
    reply[#reply + 1] = r[1] or ''
    reply[#reply + 1] = r[2] or ''
    reply[#reply + 1] = known and journal_length(c, id) or ''
    reply[#reply + 1] = r[3] or ''
    reply[#reply + 1] = r[4] or ''
  end
  return reply
end
redis.register_function{function_name = 'autan_look', callback = autan_look, flags = {'no-writes'}}
